"""The bookkeeping of a training run, so that the loop of train_policy.py can show the method.

A `Run` counts the steps, times their phases, writes the logs, saves checkpoints, and ends the run
in good order: after a signal, when an engine fails, when too many steps had to be skipped.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from minizs import UserError
from minizs.learner import Learner
from minizs.models import loading
from minizs.protocol import decode_pieces
from minizs.runs import build, checkpoint, metrics, page, run_folder
from minizs.runs.advice import command
from minizs.runs.alarms import Alarms
from minizs.runs.flags import save_settings
from minizs.runs.settings import PolicyConfig
from minizs.trajectory import Trajectory

# The metrics that stand beside the progress bar.
IN_THE_BAR = ("reward", "searches_per_question", "held_out_f1", "kl", "noise", "entropy")
LOGGED_TRAJECTORIES = 8  # that each step writes to trajectories.jsonl


@contextmanager
def open_run(
    config: PolicyConfig, accelerator: Accelerator, folder: Path, last_step: int, engine, tokenizer
) -> Iterator["Run"]:
    """A run that goes on behind its step `last_step`; 0 where it begins. Inside, signals wait for
    the end of a step, and no other run can have the folder. Raises UserError where one has it, or
    has used it since the settings were checked."""
    with run_folder.claimed(folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process and not config.warm_start:
            check_still_free(config, folder)
        yield from _open_run(config, accelerator, folder, last_step, engine, tokenizer)


def _open_run(
    config: PolicyConfig, accelerator: Accelerator, folder: Path, last_step: int, engine, tokenizer
) -> Iterator["Run"]:
    if accelerator.is_main_process:
        print(opening_sentence(config, folder, last_step))
        prepare_folder(config, folder, last_step)
    accelerator.wait_for_everyone()
    if config.log_with:
        accelerator.log_with = [config.log_with]
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.init_trackers("minizs", asdict(config))
    run = Run(config, accelerator, folder, last_step, engine, tokenizer)
    try:
        with checkpoint.stopping() as should_stop:
            run.should_stop = should_stop
            yield run
    except KeyboardInterrupt:
        saved = run_folder.checkpoints(folder)
        if accelerator.is_main_process:
            print(run.how_to_go_on(saved[-1] if saved else 0), file=sys.stderr)
        raise
    finally:
        for tracker in accelerator.trackers:  # end_training() can hang with two processes
            tracker.finish()


@contextmanager
def claimed_folder(
    config: PolicyConfig, accelerator: Accelerator, saved: Path | None
) -> Iterator[PolicyConfig]:
    """Make the run's folder before its first step, for what comes earlier. Inside, no other run can
    have it. Gives the settings with that folder as their output, of which nothing has to be
    overwritten any more. Raises UserError as `open_run` does."""
    folder = build.agreed_folder(accelerator, config)
    with run_folder.claimed(folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            check_still_free(config, folder)
            prepare_folder(config, folder, checkpoint.step_of(saved) if saved else 0)
        accelerator.wait_for_everyone()
        yield replace(config, output=str(folder), overwrite=False)


def check_still_free(config: PolicyConfig, folder: Path) -> None:
    """Raise UserError for a folder that a run has used between the first check and the claim: a
    model may have been loaded, and a simulator made, meanwhile."""
    if not run_folder.is_empty(folder):
        run_folder.check_may_lose(folder, bool(config.resume), config.overwrite)


def opening_sentence(config: PolicyConfig, folder: Path, last_step: int) -> str:
    """Whether a run begins in this folder, or goes on."""
    if last_step:
        return f"Going on from step {last_step} of {folder}."
    if not config.resume:
        return f"A new run in {folder}."
    if run_folder.is_run(folder):
        return f"No step of {folder} is saved: it begins again with step 1."
    return f"There is no run in {folder} to resume: a new run begins there."


def prepare_folder(config: PolicyConfig, folder: Path, last_step: int) -> None:
    """Make the folder of a run, or cut what is there back to its first `last_step` steps."""
    run_folder.begin(folder, last_step, config.overwrite)
    (folder / "metrics.jsonl").touch()  # tells a run, see `run_folder.is_run`
    (folder / run_folder.DONE).unlink(missing_ok=True)  # the run is not complete any more
    # Fed back with --config, the settings begin a new run: they name no folder and resume nothing.
    settings = replace(config, output="", resume="", overwrite=False)
    save_settings(settings, folder / "config.partial")
    (folder / "config.partial").replace(folder / "config.yaml")


def never(accelerator) -> bool:
    """Without `checkpoint.stopping` nothing asks a run to stop."""
    return False


class Run:
    """What a training run writes down and saves, and when it ends."""

    def __init__(
        self,
        config: PolicyConfig,
        accelerator: Accelerator,
        folder: Path,
        last_step: int,
        engine,
        tokenizer,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.folder = folder
        self.engine = engine  # may count searches that failed, in `failed`
        self.tokenizer = tokenizer
        self.should_stop = never
        self.is_main = accelerator.is_main_process
        rows = run_folder.read_lines(folder / "metrics.jsonl")
        self.step = last_step  # the newest that was begun
        self.skipped = rows[-1]["skipped"] if rows else 0  # steps that were not finite, so far
        self.alarms = Alarms(rows, replies_expected=config.engine != "none")
        self.seconds: dict[str, float] = {}  # of each phase of the current step
        self.failed_before = 0
        self.bar = None

    # ---- for the loop ---------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left, with a progress bar."""
        self.bar = tqdm(
            range(self.step + 1, self.config.steps + 1),
            initial=self.step,
            total=self.config.steps,
            disable=not self.is_main,
            dynamic_ncols=True,
        )
        for step in self.bar:
            self.step = step
            self.seconds = {}
            self.failed_before = getattr(self.engine, "failed", 0)
            yield step

    def share(self, count: int) -> range:
        """Which of `count` questions this process plays: their places in the batch."""
        return range(self.accelerator.process_index, count, self.accelerator.num_processes)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; the last step counts."""
        is_last = self.step == self.config.steps
        return every > 0 and (is_last or self.step % every == 0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step. If an engine fails in it, all processes leave together."""
        started = time.perf_counter()
        failure = None
        try:
            yield
        except UserError as error:  # a server is gone, or a simulator is of no use
            if name != "rollout":
                raise
            failure = error
        if metrics.total(self.accelerator, failure is not None):
            self._leave(failure)
        self.seconds[name] = time.perf_counter() - started

    def log(
        self, noise: float, figures: dict, trajectories: list[Trajectory], learner: Learner
    ) -> None:
        """Write the step into metrics.jsonl, trajectories.jsonl and trackers; sound alarms."""
        row = {"step": self.step, "noise": noise, "processes": self.accelerator.num_processes}
        row |= metrics.of_trajectories(self.accelerator, trajectories)
        row |= figures
        row |= self._counts(row)
        row |= self._timings(row)
        if figures["skipped"]:
            self._log_suspects(trajectories, learner)
        if self.is_main:
            run_folder.write_lines(self.folder / "metrics.jsonl", [row])
            self._log_trajectories(trajectories, learner)
            self.bar.set_postfix({name: f"{row[name]:.2f}" for name in IN_THE_BAR if name in row})
            for sentence in self.alarms.check(row):
                tqdm.write(f"Step {self.step}: {sentence}")
        values = {name: value for name, value in row.items() if name != "step"}
        self.accelerator.log(values, step=self.step)

    def save_if_due(self) -> None:
        """Save at the chosen interval, and before the run ends early; then end it."""
        stop = self.should_stop(self.accelerator)  # every process asks: they stop together
        broken = self.skipped > self.config.max_skipped
        if self.due(self.config.save_every) or stop or broken:
            self._save(self.step)
        if broken:
            raise UserError(
                f"{self.skipped} steps had a loss or gradient that is not finite; "
                f"{self.folder}/suspects.jsonl has their trajectories. Begin anew with a lower "
                f"--lr, or go on with: {self._resume_command('--max_skipped', 2 * self.skipped)}"
            )
        if stop:
            self._stop(f"Stopped after step {self.step}. {self.how_to_go_on(self.step)}")

    # ---- after the loop -------------------------------------------------------------------------

    def finish(self, model: torch.nn.Module, template: str, start: str) -> None:
        """Write the page, the cost and the final policy. Only one process calls this. `start` is
        the model that training started from, to which a LoRA belongs."""
        config = self.config
        folder = self.folder
        if config.merge:
            loading.save_model(model, self.tokenizer, folder / "adapter")
            model = build.merged_model(config, start, folder / "adapter")
        page.write_page(folder)
        cost = metrics.cost(run_folder.read_lines(folder / "metrics.jsonl"), config.engine)
        run_folder.write_json(folder / "cost.json", cost)
        policy = folder / "policy"
        run_folder.remember_training(policy, config)
        # The prompt is the last file that is written. With it the run is complete.
        loading.save_model(model, self.tokenizer, policy, prompt=template)
        print(metrics.cost_sentence(cost))
        print(
            f"The policy is in {policy} and {folder / 'report.html'} shows the run. "
            f"Test it: {command('evaluate.py', '--policy', policy)}"
        )

    # ---- details --------------------------------------------------------------------------------

    def _counts(self, row: dict) -> dict[str, int]:
        trajectories = self.config.batch_questions * self.config.group_size
        failed = getattr(self.engine, "failed", 0) - self.failed_before
        self.skipped += row["skipped"]
        return {
            "skipped": self.skipped,
            "queries": round(row["searches_per_question"] * trajectories),
            "search_errors": metrics.total(self.accelerator, failed),
        }

    def _timings(self, row: dict) -> dict[str, float]:
        trajectories = self.config.batch_questions * self.config.group_size
        timings = {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}
        timings["seconds"] = self.seconds["rollout"] + self.seconds["update"]
        timings["tokens_per_second"] = row["trajectory_tokens"] * trajectories / timings["seconds"]
        return timings

    def _log_suspects(self, trajectories: list[Trajectory], learner: Learner) -> None:
        """Write what spoilt the step, of all processes, into suspects.jsonl."""
        suspects = []
        for place in sorted(learner.suspects):
            suspects.append({"step": self.step} | asdict(trajectories[place]))
        suspects = gather_object(suspects)
        if self.is_main:
            run_folder.write_lines(self.folder / "suspects.jsonl", suspects)

    def _log_trajectories(self, trajectories: list[Trajectory], learner: Learner) -> None:
        """Write one trajectory of each group, then a second of each, up to the limit."""
        places = sorted(range(len(trajectories)), key=lambda place: place % self.config.group_size)
        rows = []
        for place in places[:LOGGED_TRAJECTORIES]:
            trajectory = trajectories[place]
            advantages = learner.token_advantages[place][: len(trajectory.ids)].tolist()
            row = {"step": self.step} | asdict(trajectory)
            row["pieces"] = decode_pieces(self.tokenizer, trajectory.ids)
            row["advantages"] = [round(advantage, 4) for advantage in advantages]
            rows.append(row)
        run_folder.write_lines(self.folder / "trajectories.jsonl", rows)

    def _save(self, step: int) -> None:
        if self.is_main:
            page.write_page(self.folder)
        checkpoint.save_checkpoint(self.accelerator, self.folder, step, self.config.keep)

    def _leave(self, failure: UserError | None) -> None:
        """An engine has failed: save the steps that are done, and end all processes.

        Only a rollout asks an engine, so the weights are those of the step before.
        """
        last_step = self.step - 1
        self._save(last_step)
        if failure is None:  # another process tells why
            raise SystemExit(1)
        reason = str(failure).rstrip(".")
        raise UserError(f"{reason}. {self.how_to_go_on(last_step)}") from failure

    def _stop(self, sentence: str) -> None:
        raise SystemExit(sentence if self.is_main else 1)

    def how_to_go_on(self, saved_step: int) -> str:
        """The command that resumes the run, whose step `saved_step` is saved; 0 where none is."""
        if saved_step:
            return f"Step {saved_step} is saved; go on with: {self._resume_command()}"
        return f"No step is saved; begin again with: {self._resume_command()}"

    def _resume_command(self, *settings: object) -> str:
        return command("train_policy.py", "--output", self.folder, "--resume", *settings)
