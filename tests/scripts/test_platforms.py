"""Other machines than this one: Apple's GPUs, Windows, busy cores, a package that is missing.

What is not at hand has a stand-in that refuses what the real one refuses."""

import ast
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import FILE, POLICY, ROOT, evaluation, policy, refused, simulator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import minizs
from minizs import UserError
from minizs.models import loading, precision
from minizs.runs import checkpoint, flags, run_folder

# ---- Apple's GPUs: no float64 ------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """Plays a device without float64 on the CPU: whatever makes such a tensor raises."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{func} made a tensor of float64, which this device has not.")
        return result


@pytest.fixture
def no_float64(monkeypatch):
    from_numpy = torch.from_numpy

    def on_the_host(array):
        with _disable_current_modes():
            return from_numpy(array)

    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"cpu"})
    monkeypatch.setattr(torch, "from_numpy", on_the_host)  # NumPy's arrays are not on a device
    with NoFloat64():
        yield


def test_the_stand_in_refuses_float64(no_float64):
    """So that the next tests can fail."""
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()
    with pytest.raises(TypeError, match="float64"):
        torch.tensor([1.0], dtype=torch.float64)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "reinforce"])
def test_training_needs_no_float64(work, no_float64, algorithm):
    """Rollout, metrics, advantages, loss, a step, a checkpoint and a held-out test."""
    flags = ["--algorithm", algorithm, "--output", "run"]
    policy(*flags, "--kl_coef", "0.1", "--eval_every", "1", "--save_every", "1")
    assert (work / "run" / "policy").is_dir()


def test_the_other_stages_need_no_float64(work, no_float64):
    """The simulator's training and report, and sampled answers."""
    simulator("--output", "simulator")
    evaluation("--policy", "../base", "--before", "none", *FILE, "--output", "a.json")
    evaluation(
        "--policy", "../base", "--before", "none", *FILE, "--output", "b.json", "--temperature", "1"
    )


def test_the_widest_float():
    """Sums are in float64 wherever there is one."""
    assert precision.widest_float(torch.device("mps")) == torch.float32
    for kind in ("cpu", "cuda", "meta"):
        assert precision.widest_float(torch.device(kind)) == torch.float64


# ---- Windows -----------------------------------------------------------------------------------


def test_only_a_file_opened_for_writing_is_synchronised(work, monkeypatch):
    """As on Windows, where `os.fsync` of a file opened for reading is an error."""
    fcntl = pytest.importorskip("fcntl")
    fsync = os.fsync
    count = []

    def strict(number: int) -> None:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        count.append(number)
        fsync(number)

    monkeypatch.setattr(os, "fsync", strict)
    policy("--output", "run", "--save_every", "1")
    folder = work / "run" / "checkpoints" / "step-1"
    assert len(count) > sum(path.is_file() for path in folder.rglob("*"))
    assert checkpoint.is_whole(folder)
    for path in folder.rglob("*"):  # reading alone is enough to check it
        path.chmod(0o500 if path.is_dir() else 0o400)
    assert checkpoint.is_whole(folder)


def test_checksums_have_the_same_names_everywhere(work):
    """A checkpoint of Windows is resumed elsewhere, so its names hold no backslash."""
    policy("--output", "run", "--save_every", "1")
    text = (work / "run" / "checkpoints" / "step-1" / checkpoint.SUMS).read_text(encoding="utf-8")
    assert "\\" not in text


def test_a_folder_takes_the_place_of_an_empty_one(tmp_path, monkeypatch):
    """As on Windows, where no folder is renamed over another; one with files is never lost."""
    rename = Path.rename

    def strict(path: Path, target: Path) -> Path:
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", strict)
    for name in ("new", "empty", "full"):
        (tmp_path / name).mkdir()
    for name in ("new", "full"):
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(UserError, match="the whole result is in"):
        run_folder.move(tmp_path / "new", tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "full"
    run_folder.move(tmp_path / "new", tmp_path / "empty")
    assert (tmp_path / "empty" / "file").read_text() == "new"


def test_every_text_file_has_its_encoding():
    """Windows takes another one than UTF-8 for files that are opened without any."""
    patterns = ("*.py", "minizs/**/*.py", "benchmarks/*.py", ".ci/*.py")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    seen = 0
    for file in files:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if ast.unparse(call.func) == "gzip.open":
                continue  # binary by default
            texts = [node.value for node in call.args if isinstance(node, ast.Constant)]
            if name in ("open", "read_text", "write_text") and not {"rb", "r+b", "wb"} & {*texts}:
                seen += 1
                keywords = {keyword.arg for keyword in call.keywords}
                assert "encoding" in keywords, f"{file.name}:{call.lineno}"
    assert seen > 20


def test_a_path_of_windows_is_no_hub_name():
    """A folder that is not there is said to be missing, not looked up in the hub."""
    with pytest.raises(flags.UserError, match="no model folder"):
        loading.check_model("C:\\models\\base")


def test_letters_that_the_terminal_lacks_are_replaced():
    """A question in other letters is no reason to stop, as it is where they cannot be printed."""
    code = "from minizs.runs.flags import run_script; run_script(lambda _: print('F1 ± \\u4e2d'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == b"F1 ? ?"


# ---- Busy machines -----------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    """The environment without any word on threads."""
    for name in (
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
        "OMP_NUM_THREADS",
        *flags.LAUNCHERS,
        "LOCAL_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("script", ["train_policy", "train_sim", "evaluate"])
def test_waiting_threads_sleep_before_torch_is_loaded(environment, script):
    """OpenMP reads the policy when torch is loaded; what the script starts inherits it."""
    code = f"""
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            os._exit(0)
sys.meta_path.insert(0, Finder())
import {script}
{script}.main(["--output", "x", "--threads", "1"])
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.split() == ["PASSIVE"], process.stderr


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "9")])
def test_the_users_wait_policy_stays(environment, name, value):
    """Who measures on an idle machine may have threads spin."""
    environment.setenv(name, value)
    minizs.wait_quietly()
    assert os.environ[name] == value
    assert (os.environ.get("OMP_WAIT_POLICY") or "ACTIVE") == "ACTIVE"


ACCELERATE, TORCHRUN = "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"


@pytest.mark.parametrize(
    "flag, variables, expected",
    [
        (0, {}, 6),  # all cores
        (0, {"OMP_NUM_THREADS": "1"}, None),  # the user's
        (0, {"OMP_NUM_THREADS": "3", ACCELERATE: "no"}, None),  # no launcher sets 3
        (0, {"OMP_NUM_THREADS": "1", ACCELERATE: "no"}, 6),  # the launcher's
        (0, {"OMP_NUM_THREADS": "1", TORCHRUN: "none", "LOCAL_WORLD_SIZE": "2"}, 3),
        (0, {"LOCAL_WORLD_SIZE": "12"}, 1),
        (2, {"OMP_NUM_THREADS": "4"}, 2),  # the flag goes before all
    ],
)
def test_threads_are_the_users_or_a_share_of_the_cores(environment, flag, variables, expected):
    """`expected` None: torch keeps the number that it has read from OMP_NUM_THREADS."""
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    numbers = []
    environment.setattr(torch, "set_num_threads", numbers.append)
    flags.set_threads(flag)
    assert numbers == ([] if expected is None else [expected])


def test_cores_where_the_system_tells_no_affinity(environment):
    """Windows and macOS have no `os.sched_getaffinity`."""
    environment.delattr(os, "sched_getaffinity", raising=False)
    environment.setattr(os, "cpu_count", lambda: 5)
    numbers = []
    environment.setattr(torch, "set_num_threads", numbers.append)
    flags.set_threads(0)
    assert numbers == [5]


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_the_launchers_are_told_apart_from_the_user(environment, tmp_path, launcher):
    """What `accelerate launch` and `torchrun` really set, with and without the user's number."""
    script = tmp_path / "script.py"
    script.write_text(
        "from minizs.runs import flags\nprint(f'chosen {flags.threads_set_by_user()}\\n', end='')\n"
    )
    module = {
        "accelerate": ["accelerate.commands.launch"],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }[launcher]
    command = [sys.executable, "-m", *module, str(script)]
    for number, expected in ((None, "False"), ("3", "True")):
        own = os.environ | {"PYTHONPATH": str(ROOT)}
        if number:
            own["OMP_NUM_THREADS"] = number
        process = subprocess.run(command, env=own, capture_output=True, text=True)
        assert f"chosen {expected}" in process.stdout, process.stderr


# ---- What is missing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, package",
    [
        ("train_policy", "transformers"),
        ("train_policy", "torch"),
        ("train_policy", "bm25s"),
        ("train_policy", "yaml"),
        ("evaluate", "jinja2"),
    ],
)
def test_a_missing_package_is_named_with_the_command(work, script, package):
    """One sentence and exit status 2, whichever of them is not there."""
    code = f"""
import sys
sys.modules["{package}"] = None
sys.argv = ["{script}.py", "--engine", "bm25", "--policy", "tiny", "--threads", "1"]
import {script}
from minizs.runs.flags import run_script
run_script({script}.main)
"""
    own = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2, process.stderr[-2000:]
    assert lines[-1] == (
        f"error: the package {package} is missing; install it with: pip install -r requirements.txt"
    )
    assert not any("Traceback" in line for line in lines)


def test_a_module_of_ours_that_is_missing_is_a_bug():
    """It keeps its traceback: no installation would mend it."""

    def main(_):
        import minizs.nothing  # noqa: F401

    with pytest.raises(ModuleNotFoundError):
        flags.run_script(main, [])


# ---- An output that cannot be made -------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux")
@pytest.mark.parametrize(
    "run, flags",
    [
        (policy, "--output /proc/x"),
        (simulator, "--output /proc/x"),
        (evaluation, "--policy ../base --before none --output /proc/x.json"),
    ],
)
def test_an_output_is_tried_before_anything_is_made(work, run, flags, monkeypatch):
    """The system's word is not enough: root may write to /proc by it, and cannot."""
    monkeypatch.setattr("minizs.runs.build.make_accelerator", lambda _: pytest.fail("it began"))
    refused(run, " ".join([flags, *(FILE if run is evaluation else [])]), "/proc", work)


def test_what_was_tried_is_removed(tmp_path):
    """Nothing is left of the trial, above or in the output."""
    (tmp_path / "there").mkdir()
    for name in ("there", "new", "new/deep/er", "there/../other/x"):
        assert run_folder.can_be_made(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    (tmp_path / "file").write_text("")
    assert not run_folder.can_be_made(tmp_path / "file" / "below")


def test_a_trial_of_another_process_is_no_content(tmp_path):
    """Two processes of one run check the same empty folder at the same time."""
    (tmp_path / f"{run_folder.TRIAL}abc").mkdir()
    run_folder.check_free(tmp_path, resume=False, overwrite=False)


# ---- What a first run prints -------------------------------------------------------------------

LAUNCHER = r"The following values were not passed|^\s*`--\w+` was set|^To avoid this warning pass"
BAR = r"\d+%\|"


def test_a_run_prints_nothing_of_other_packages(work):
    """No warning and no loading bar of a library: only our bar, and the launcher's first words."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train_policy.py")]
    flags = [*POLICY, "--lora_rank", "2", "--merge", "True", "--save_every", "1", "--output", "run"]
    process = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = re.split(r"[\r\n]+", process.stderr)
    foreign = [line for line in lines if line.strip() and not re.search(f"{LAUNCHER}|{BAR}", line)]
    assert not foreign
    starts = ("../questions.jsonl", "Attention by", "A new run in", "The policy is in")
    for line in process.stdout.splitlines():
        assert line.startswith(starts) or " queries (" in line, line
