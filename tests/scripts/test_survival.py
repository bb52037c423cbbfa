"""A run comes through: killed, stopped, with damaged checkpoints, over many steps, with NaNs."""

import gc
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from accelerate import tracking
from counts import COUNTS
from scripts import POLICY, ROOT, everything, metrics, policy, refused

import train_policy
from minizs import UserError, learner
from minizs.engines.client import ServiceError
from minizs.runs import build, checkpoint, run_folder

SHORT = ["--steps", "6", "--save_every", "1", "--kl_coef", "0.1"]


def same(run: Path, whole: Path) -> None:
    """Metrics (timings apart), trajectories and weights, bit for bit."""
    assert metrics(run) == metrics(whole)  # which also parses every line
    for name in ("trajectories.jsonl", "policy/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


# ---- killed at any moment -----------------------------------------------------------------------


def kill_and_compare(work, kills: int, seed: int, *flags: str) -> None:
    command = [sys.executable, str(ROOT / "tests" / "killed.py"), str(work), str(kills), str(seed)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *POLICY, *SHORT, *flags], env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{kills} kills" in done.stdout
    cuts = sorted(work.glob("cut-*"))
    assert cuts
    for run in cuts:
        same(run, work / "whole")
    assert metrics(work / "whole")[-1]["kl"] != 0
    COUNTS["kills survived"] += kills


def test_a_killed_run_ends_as_if_it_had_not_been(work):
    """Killed at random and resumed, a run ends with the same logs and weights, bit for bit."""
    kill_and_compare(work, 3, 0)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "reinforce"])
def test_twenty_kills(work, algorithm):
    """The same, for long and for each algorithm."""
    kill_and_compare(work, 20, 1, "--algorithm", algorithm)


def launch(*flags: str) -> subprocess.Popen:
    """train_policy on two processes, all of them in one new process group."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += ["2", str(ROOT / "train_policy.py"), *POLICY, *SHORT, *flags]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    """torchrun and what it started, all at once."""
    parent = psutil.Process(process.pid)
    for member in [*parent.children(recursive=True), parent]:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


def end(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "reinforce"])
def test_two_processes_are_killed(work, algorithm):
    """The same for two processes, which are killed together."""
    most_kills = int(os.environ.get("MINIZS_KILLS", "20"))  # fewer, on a slow machine
    flags = ["--algorithm", algorithm, "--output"]
    rng = random.Random(2)
    kills = 0
    started = time.monotonic()
    end(launch(*flags, "whole"))
    seconds = time.monotonic() - started
    for run in range(most_kills):
        while kills < most_kills:
            process = launch(*flags, f"cut-{run}", "--resume")
            try:
                process.communicate(timeout=rng.uniform(0.3, 1) * seconds)
                break
            except subprocess.TimeoutExpired:
                kill(process)
                kills += 1
        if kills == most_kills:
            end(launch(*flags, f"cut-{run}", "--resume"))
            break
    for run in work.glob("cut-*"):
        same(run, work / "whole")
    COUNTS["kills survived"] += kills


# ---- stopped, and gone on with ------------------------------------------------------------------


def at_step(monkeypatch, step: int, call) -> None:
    """Have `call()` made in the middle of a step: its lines are written, its checkpoint is not."""
    written = run_folder.write_lines

    def writing(path, rows, *mode):
        written(path, rows, *mode)
        if path.name == "trajectories.jsonl" and rows[0]["step"] == step:
            call()

    monkeypatch.setattr(run_folder, "write_lines", writing)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(work, monkeypatch, number):
    """SIGTERM and Ctrl-C wait for the end of the step, save it, and say how to go on."""
    flags = ["--steps", "3", "--output"]
    policy(*flags, "whole")
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            policy(*flags, "cut")
    assert "Stopped after step 2. Step 2 is saved; go on with: " in str(stop.value)
    assert signal.getsignal(number) is handler
    assert [path.name for path in (work / "cut" / "checkpoints").iterdir()] == ["step-2"]
    run_advice(str(stop.value))
    same(work / "cut", work / "whole")


def run_advice(message: str) -> None:
    """Run the command at the end of a message as a shell would, in this process."""
    words = shlex.split(message[message.index("python ") :])
    assert Path(words[1]).is_file() and Path(words[1]).name == "train_policy.py"
    train_policy.main(words[2:])


def test_a_second_ctrl_c_ends_at_once(work, monkeypatch, capsys):
    """The second Ctrl-C does not wait, and does not claim that anything was saved."""
    at_step(monkeypatch, 1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        policy("--output", "cut")
    assert not (work / "cut" / "checkpoints").exists()
    error = capsys.readouterr().err
    assert "No step is saved; begin again with: python " in error
    monkeypatch.undo()
    os.chdir(work)
    run_advice(error)
    assert len(metrics(work / "cut")) == 2


@pytest.mark.slow
def test_two_processes_stop_together(work):
    """A signal to the launcher ends both processes after the same step."""
    process = launch("--steps", "500", "--save_every", "0", "--output", "cut")
    while not metrics(work / "cut") if (work / "cut" / "metrics.jsonl").exists() else True:
        time.sleep(0.2)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.count("Stopped after step") == 1
    rows = metrics(work / "cut")
    assert [path.name for path in (work / "cut" / "checkpoints").iterdir()] == [f"step-{len(rows)}"]


class Faulty:
    """An engine that fails for good at the k-th call, and counts what it lost before."""

    def __init__(self, calls: int, error: type[UserError] = ServiceError) -> None:
        self.calls = calls
        self.failed = 0
        self.error = error

    def search(self, requests):
        self.calls -= 1
        if self.calls == 0:
            raise self.error("The server is gone.")
        self.failed += len(requests)
        return [[] for _ in requests]


@pytest.mark.parametrize("kind", [ServiceError, UserError])
def test_an_engine_that_is_gone_costs_no_step(work, monkeypatch, kind):
    """The steps that are done are saved, and failed searches are counted in their lines. It may be
    a server, or a simulator here that writes no documents any more."""
    monkeypatch.setattr("minizs.runs.build.build_engine", lambda *_: Faulty(5, kind))
    with pytest.raises(UserError) as error:
        policy("--steps", "9", "--save_every", "8", "--output", "cut short")
    rows = metrics(work / "cut short")
    done = len(rows)
    assert 0 < done < 9
    points = (work / "cut short" / "checkpoints").iterdir()
    assert [path.name for path in points] == [f"step-{done}"]
    assert [row["search_errors"] for row in rows] == [row["queries"] for row in rows]
    assert f"The server is gone. Step {done} is saved; go on with: python" in str(error.value)
    monkeypatch.setattr("minizs.runs.build.build_engine", lambda *_: Faulty(10**9))
    run_advice(str(error.value))
    assert len(metrics(work / "cut short")) == 9


def test_an_engine_that_is_gone_at_once_leaves_nothing_to_save(work, monkeypatch):
    """The message does not claim that a step is saved, and its command begins the run again: with
    other settings too, as its other advice may be to change one."""
    monkeypatch.setattr("minizs.runs.build.build_engine", lambda *_: Faulty(1))
    with pytest.raises(UserError, match="No step is saved; begin again with: ") as error:
        policy("--output", "cut")
    monkeypatch.setattr("minizs.runs.build.build_engine", lambda *_: Faulty(10**9))
    run_advice(str(error.value))
    assert len(metrics(work / "cut")) == 2
    monkeypatch.setattr("minizs.runs.build.build_engine", lambda *_: Faulty(1))
    with pytest.raises(UserError, match="No step is saved"):
        policy("--output", "changed")
    monkeypatch.setattr("minizs.runs.build.build_engine", lambda *_: Faulty(10**9))
    policy("--output", "changed", "--resume", "--top_k", "2")
    with pytest.raises(UserError, match="--top_k was 2 and is 3"):  # now it has shaped something
        policy("--output", "changed", "--resume", "--top_k", "3")


FILES = ["model.safetensors", "optimizer.bin", checkpoint.SUMS]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_a_damaged_checkpoint(tmp_path, trained, name, how, capsys):
    """Bare --resume skips a damaged checkpoint with a warning; a named one is refused."""
    shutil.copytree(trained / "checkpoints", folder := tmp_path / "checkpoints")
    file = folder / "step-3" / name
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + (b"" if how == "truncated" else b"x" * len(data)))
    if how == "missing":
        file.unlink()
    assert checkpoint.find_checkpoint("latest", tmp_path) == folder / "step-2"
    warning = capsys.readouterr().out
    assert warning.count("\n") == 1 and "step-3 is damaged and skipped" in warning
    with pytest.raises(UserError, match="step-3 is damaged; --resume alone"):
        checkpoint.find_checkpoint(str(folder / "step-3"), tmp_path)
    assert checkpoint.find_checkpoint(str(folder / "step-2"), tmp_path) == folder / "step-2"


@pytest.fixture(scope="module")
def trained(home) -> Path:
    """A run of three steps with checkpoints of the last two."""
    folder = home / "trained"
    with pytest.MonkeyPatch.context() as patch:
        (home / "beside").mkdir()
        patch.chdir(home / "beside")
        policy("--steps", "3", "--save_every", "1", "--output", str(folder))
    return folder


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_nothing_of_a_checkpoint_is_run(work, trained, name):
    """A checkpoint from elsewhere can hold a pickle with code; it is never run."""
    run = shutil.copytree(trained, work / "run")
    shutil.rmtree(run / "policy")  # so that there is something left to do
    step = run / "checkpoints" / "step-3"

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("evil",)

    (step / name).write_bytes(pickle.dumps(Evil()))
    sums = json.loads((step / checkpoint.SUMS).read_text())
    sums[name] = checkpoint.checksum(step / name)
    (step / checkpoint.SUMS).write_text(json.dumps(sums))
    if name == "optimizer.bin":
        with pytest.raises(UserError, match="step-3 cannot be loaded"):
            train_policy.main(["--output", "run", "--resume"])
    else:  # not needed: all randomness is a function
        train_policy.main(["--output", "run", "--resume"])
    assert not (work / "evil").exists()


def test_other_settings_are_refused(work, trained):
    """A resumed run may change its bookkeeping, and nothing that its training depends on."""
    shutil.copytree(trained, work / "run")
    for flags, names in (
        ("--lr 0.5", "--lr was 0.01 and is 0.5"),
        ("--seed 3", "--seed was 0"),
        ("--steps 9", "--steps was 3 and is 9"),
        ("--algorithm ppo --lr 0.5", "--algorithm was 'grpo' and is 'ppo'"),
        ("--lora_rank 2", "--lora_rank"),
    ):
        refused(
            lambda *given: train_policy.main(["--output", "run", "--resume", *given]),
            flags,
            names,
            work,
        )
    train_policy.main("--output run --resume --keep 5 --save_every 7 --timeout 1".split())
    (work / "run" / "config.yaml").write_text("")  # else it would go on with the defaults
    refused(
        lambda *given: train_policy.main(["--output", "run", "--resume", *given]),
        "",
        "config.yaml is lost or empty",
        work,
    )
    (work / "run" / "config.yaml").unlink()
    refused(
        lambda *given: train_policy.main(["--output", "run", "--resume", *given]),
        "",
        "config.yaml is lost or empty",
        work,
    )


def test_a_folder_with_a_file_of_our_name_is_no_run(tmp_path):
    """A user's own config.yaml, or a copy of a checkpoint, is not taken for a run."""
    (tmp_path / "config.yaml").write_text("steps: 3")
    run_folder.check_free(tmp_path / "new", resume=False, overwrite=False)
    with pytest.raises(UserError, match="holds no run"):
        run_folder.check_free(tmp_path, resume=False, overwrite=True)
    (tmp_path / "run" / "checkpoints" / "step-2-copy-1").mkdir(parents=True)
    assert run_folder.checkpoints(tmp_path / "run") == []


def test_two_runs_never_write_to_one_folder(work, trained):
    """The second is refused, also one that resumes; the claim ends with the first and leaves no
    file."""
    with run_folder.claimed(Path("run")):
        refused(policy, "--output run", "Another run is writing to run", work)
    shutil.copytree(trained, "run")
    shutil.rmtree("run/policy")  # so that there is something left to do
    with run_folder.claimed(Path("run")):
        refused(policy, "--output run --resume --steps 3", "Another run is writing to run", work)
    assert [path.name for path in work.iterdir()] == ["run"]
    with run_folder.claimed(Path("warm")):
        refused(policy, "--output warm --warm_start scripted", "Another run is writing", work)


def test_a_run_that_ended_meanwhile_is_not_lost(work, trained, monkeypatch):
    """The folder was free when the settings were checked, and is not when the first step begins."""
    build_engine = build.build_engine

    def slow(*arguments):
        shutil.copytree(trained, "run")
        return build_engine(*arguments)

    monkeypatch.setattr("minizs.runs.build.build_engine", slow)
    with pytest.raises(UserError, match="run is not empty; add --resume"):
        policy("--output", "run")
    assert everything(Path("run")).keys() == everything(trained).keys()
    assert metrics(Path("run")) == metrics(trained)


# ---- losses that are not finite -----------------------------------------------------------------


def spoil(monkeypatch, *steps: int) -> None:
    """Rewards that are not a number, in these updates."""
    update = learner.Learner.update
    numbers = iter(range(1, 100))

    def spoilt(self, trajectories):
        reward = trajectories[0].reward
        if next(numbers) in steps:
            trajectories[0].reward = float("nan")
        figures = update(self, trajectories)
        trajectories[0].reward = reward
        return figures

    monkeypatch.setattr(learner.Learner, "update", spoilt)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_step_that_is_not_finite_is_skipped(work, monkeypatch, algorithm):
    """The weights stay as they were, the rows that spoilt the step are logged, the log is JSON."""
    spoil(monkeypatch, 1, 3)
    flags = ["--algorithm", algorithm, "--kl_coef", "0.1", "--save_every", "1", "--keep", "9"]
    policy(*flags, "--minibatches", "1", "--steps", "4", "--output", "run")
    text = (work / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and [row["skipped"] for row in metrics(work / "run")] == [1, 1, 2, 2]
    points = [(work / "run" / "checkpoints" / f"step-{n}") for n in (1, 2, 3, 4)]
    for name in ("model.safetensors", *["model_1.safetensors"] * (algorithm == "ppo")):
        one, two, three, four = ((point / name).read_bytes() for point in points)
        assert one != two == three != four
    suspects = run_folder.read_lines(work / "run" / "suspects.jsonl")
    assert {row["step"] for row in suspects} == {1, 3} and suspects[0]["ids"]


def test_too_many_skipped_steps_end_a_run(work, monkeypatch):
    """A run ends after --max_skipped such steps; those of before a resume count."""
    spoil(monkeypatch, 2, 4)
    policy_flags = ["--steps", "6", "--max_skipped", "1", "--output", "run"]
    with pytest.raises(
        UserError, match="2 steps had a loss .* not finite; run/suspects.jsonl"
    ) as error:
        policy(*policy_flags)
    assert len(metrics(work / "run")) == 4
    with pytest.raises(UserError, match="2 steps had"):
        policy(*policy_flags, "--resume")
    assert len(metrics(work / "run")) == 5
    run_advice(str(error.value))
    assert len(metrics(work / "run")) == 6


# ---- seen while it runs -------------------------------------------------------------------------


class Tracker:
    """In place of TensorBoard's."""

    name = "tensorboard"
    requires_logging_directory = True
    main_process_only = True
    seen = []

    def __init__(self, project: str, folder: str) -> None:
        self.seen.append(folder)

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict) -> None:
        self.seen.append(values["steps"])

    def log(self, values: dict, step: int, **_) -> None:
        assert "step" not in values  # a name that trackio keeps for itself
        self.seen.append((step, values["reward"]))

    def finish(self) -> None:
        self.seen.append("end")


def test_other_logs(work, monkeypatch):
    """--log_with gets each step's metrics; a missing package is told at once."""
    monkeypatch.setattr("minizs.runs.settings.find_spec", lambda name: None)
    refused(policy, "--log_with wandb", "pip install wandb", work)
    monkeypatch.undo()
    os.chdir(work)
    monkeypatch.setattr("minizs.runs.settings.find_spec", lambda name: name)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    policy("--log_with", "tensorboard", "--output", "run")
    logged = [(row["step"], row["reward"]) for row in metrics(work / "run")]
    assert Tracker.seen == ["run", 2, *logged, "end"]


def test_a_shown_trajectory_says_what_was_made_of_it(work):
    """trajectories.jsonl has each token's text and advantage: one on own tokens, 0 elsewhere."""
    policy("--output", "run", "--micro_tokens", "200", "--kl_coef", "0")
    rows = run_folder.read_lines(work / "run" / "trajectories.jsonl")
    for row in rows:
        assert len(row["pieces"]) == len(row["advantages"]) == len(row["ids"])
        pairs = list(zip(row["advantages"], row["loss_mask"], strict=True))
        own = {advantage for advantage, mask in pairs if mask}
        assert len(own) == 1 and not any(advantage for advantage, mask in pairs if not mask)
        group = [
            other["reward"]
            for other in rows
            if (other["step"], other["example"]) == (row["step"], row["example"])
        ]
        assert len(group) == 2 and (own.pop() > 0) == (row["reward"] > sum(group) / 2 + 1e-9)
        written = [
            text.strip() for text, mask in zip(row["pieces"], row["loss_mask"], strict=True) if mask
        ]
        assert "<answer>" in row["turns"][-1]["text"] and "<answer>" in written


# ---- for long -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_hundred_steps_leak_nothing(work, monkeypatch):
    """Memory and open files do not grow with the number of steps."""
    sizes = []
    handles = []
    process = psutil.Process()
    written = run_folder.write_lines

    def measured(path, rows, *mode):
        written(path, rows, *mode)
        if path.name == "trajectories.jsonl" and rows[0]["step"] % 20 == 0:
            gc.collect()
            sizes.append(process.memory_info().rss)
            handles.append(process.num_fds())

    monkeypatch.setattr(run_folder, "write_lines", measured)
    policy("--steps", "300", "--save_every", "50", "--eval_every", "100", "--output", "run")
    assert len(metrics(work / "run")) == 300
    assert max(handles) <= handles[1] + 2
    assert sizes[-1] - sizes[4] < 0.05 * sizes[4], sizes  # after the first 100
