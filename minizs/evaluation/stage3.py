"""The parts of evaluate.py: policies side by side on the same questions, or one answer shown."""

import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from minizs import UserError, require
from minizs.evaluation.baselines import answer_at_once
from minizs.evaluation.outputs import Output, claimed_output
from minizs.evaluation.scores import answer_all, markdown, table, to_line, warnings
from minizs.models import loading
from minizs.rollout import Policy, rollout
from minizs.runs import build, data, metrics, page, run_folder
from minizs.runs.flags import may_change
from minizs.runs.settings import EvalConfig, has_noisy_test
from minizs.runs.terminal import paint, show_turn, visible
from minizs.trajectory import Example, Trajectory


@dataclass
class Result:
    """What a policy has answered, in the test and in the second one, whose replies are noisy."""

    search_errors: int
    trajectories: list[Trajectory]
    noisy: list[Trajectory] | None = None  # of the same questions; None without such a test

    def table(self) -> dict[str, dict]:
        rows = table(self.trajectories)
        rows["overall"]["search_errors"] = self.search_errors
        return rows


# ---- Questions and policies ----------------------------------------------------------------------


def load_questions(config: EvalConfig, role: str, accelerator) -> list[Example]:
    """The questions of the test: all of a file ("test"), or what training left out ("dev")."""
    examples = data.load_examples(config.data, role, accelerator.print)
    require(
        bool(examples),
        f"{config.policy} was trained on {config.data}, and none of its questions was held out: "
        "give --data FILE with others.",
    )
    return data.spread(examples, config.questions)


def train_first_policy(config: EvalConfig, examples: Sequence[Example], accelerator) -> str:
    """The policy of a first run, which is made here by one process. Raises UserError."""
    build.build_engine(config, "test", accelerator, examples)  # what is wrong with it is said now
    with accelerator.main_process_first():
        if not run_folder.newest_run():  # else the main process has just made it
            build.run_stage("train_policy.py")
    return str(run_folder.newest_run() / "policy")


def policies_to_compare(config: EvalConfig, accelerator) -> list[str]:
    """The names of what the policy is compared with, if anything is, and of the policy itself."""
    if config.before == "auto":
        config.before = run_folder.trained_with(Path(config.policy)).get("base", "none")
        try:
            loading.check_model("tiny" if config.before == "none" else config.before)
        except UserError as error:
            accelerator.print(f"The policy is tested alone. {error}")
            config.before = "none"
    return [config.policy] if config.before == "none" else [config.before, config.policy]


def load_policy(config: EvalConfig, name: str, accelerator) -> Policy:
    """The model, tokenizer and prompt of a name, with the limits of the settings. UserError."""
    model, tokenizer = build.load_configured_model(config, name, accelerator.device)
    template = loading.load_prompt(name)
    return build.make_policy(config, model, tokenizer, template, config.temperature)


def answerer(
    config: EvalConfig, policy: Policy, engine, noise: float
) -> Callable[..., list[Trajectory]]:
    """A function of examples and their keys: how the policy answers by `--method`."""
    if config.method == "search":
        return partial(rollout, policy, engine=engine, noise=noise)
    return partial(answer_at_once, config.method, policy, engine=engine)


def noise_of_tests(config: EvalConfig) -> dict[bool, float]:
    """The probability of a noisy reply in the test (False) and in the noisy one (True), if any."""
    noise = {False: config.engine_noise}
    if has_noisy_test(config):
        noise[True] = config.eval_noise
    return noise


# ---- The test ------------------------------------------------------------------------------------


def compare(
    config: EvalConfig,
    accelerator,
    examples: Sequence[Example],
    policies: dict[str, Policy],
    engine,
) -> None:
    """Let each policy answer all questions; write the figures and every answer, print the table."""
    name = fingerprint(config, examples)
    with goes_on_later(accelerator), claimed_output(config, accelerator, name) as output:
        config.output = str(output.figures)
        results = {}
        for policy_name, policy in policies.items():
            failed_before = getattr(engine, "failed", 0)
            answers = []
            for noisy, noise in noise_of_tests(config).items():
                answer = answerer(config, policy, engine, noise)
                log = output.answers / f"{name}{suffix(config, policy_name, noisy)}"
                answers.append(answer_all(answer, examples, accelerator, config.batch, log))
            failed = getattr(engine, "failed", 0) - failed_before
            search_errors = metrics.total(accelerator, failed)
            if accelerator.is_main_process:
                results[policy_name] = Result(search_errors, *answers)
        if accelerator.is_main_process:
            write_results(config, output, results)


@contextmanager
def goes_on_later(accelerator) -> Iterator[None]:
    """What Ctrl-C loses, and what it does not, is said."""
    try:
        yield
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            print("The answers so far are kept: the same command goes on there.", file=sys.stderr)
        raise


def suffix(config: EvalConfig, policy_name: str, noisy: bool = False) -> str:
    """The ending of the file with a policy's answers."""
    before = "" if policy_name == config.policy else ".before"
    return f"{before}.noisy.jsonl" if noisy else f"{before}.jsonl"


def fingerprint(config: EvalConfig, examples: Sequence[Example]) -> str:
    """Eight letters that differ where a setting, a question or a model's weights do.

    Settings that change no answer are left out: an interrupted test can go on with others.
    """
    weights = []
    for name in (config.before, config.policy):
        for file in sorted(Path(name).glob("*.safetensors")):
            weights.append((str(file), file.stat().st_mtime_ns))
    without_effect = {"output", "batch"} | may_change(config)
    settings = asdict(config) | dict.fromkeys(without_effect)
    return f"{zlib.crc32(repr((settings, list(examples), weights)).encode()):08x}"


def write_results(config: EvalConfig, output: Output, results: dict[str, Result]) -> None:
    """Write all files of an evaluation, and print the table."""
    tables = {name: result.table() for name, result in results.items()}
    noisy_tables = {name: table(result.noisy) for name, result in results.items() if result.noisy}
    paragraphs = [markdown(tables, noisy_tables, config.eval_noise)]
    if noisy_tables:
        paragraphs.append(
            f"In the last column {config.eval_noise:.0%} of the replies are noisy: they have the "
            "best documents that do not hold what the query needs."
        )
    notes = sentences_of_warning(config, results)
    text = "\n\n".join(paragraphs + notes)

    for name, result in results.items():
        write_answers(output.beside(suffix(config, name)), result.trajectories)
        if result.noisy:
            write_answers(output.beside(suffix(config, name, noisy=True)), result.noisy)
    output.beside(".md").write_text(text + "\n", encoding="utf-8")
    for name, rows in noisy_tables.items():
        tables[name]["noisy"] = rows
    figures = tables[config.policy] | {
        "settings": asdict(config),
        "before": tables.get(config.before),
        "warnings": notes,
    }
    output.figures.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    folder = output.figures.parent
    if run_folder.is_run(folder):
        page.write_page(folder)

    print(text)
    print(f"The figures are in {output.figures}, each answer in {output.beside('.jsonl')}")


def sentences_of_warning(config: EvalConfig, results: dict[str, Result]) -> list[str]:
    """What makes these figures worthless, if anything does."""
    sentences = []
    for name, result in results.items():
        for sentence in warnings(result.trajectories, config):
            sentences.append(f"{name}: {sentence}.")
    if config.engine == "simulator":
        sentences.append("The simulator has seen the gold answers: this is no test of the policy.")
    return sentences


def write_answers(path: Path, trajectories: Sequence[Trajectory]) -> None:
    lines = [to_line(*pair) for pair in enumerate(trajectories)]
    path.write_text("".join(lines), encoding="utf-8")


# ---- One question --------------------------------------------------------------------------------


def answer_question(config: EvalConfig, accelerator) -> None:
    """Print how the policy answers the question of `--ask`, as it unfolds.

    Before any run is finished it is the model that training starts from.
    """
    name = config.policy or "tiny"
    examples = [Example(config.ask, ())]
    build.check_lengths(config, [name], examples)
    policy = load_policy(config, name, accelerator)
    engine = build.build_engine(config, "test", accelerator, examples)
    answer = answerer(config, policy, engine, config.engine_noise)
    if not config.policy:
        print("No run is finished yet: this is what the model does that training starts from.")
    print(f"question {visible(config.ask)}")
    [trajectory] = answer(examples, keys=[(0,)], on_turn=show_turn)
    print(f"answer   {paint(visible(answer_line(trajectory, config)), 'answer')}")


def answer_line(trajectory: Trajectory, config: EvalConfig) -> str:
    """The answer, or why there is none."""
    if trajectory.answer is not None:
        return trajectory.answer or "empty"
    if config.method != "search" and trajectory.truncated == "turns":
        return "none: its one turn was another action"
    setting = metrics.LIMITS[trajectory.truncated]
    return f"none: it ended at --{setting} {getattr(config, setting)}"
