"""The folder of a run: where it is, what is written into it, and in which order.

config.yaml  metrics.jsonl  trajectories.jsonl  suspects.jsonl  cost.json  report.html
checkpoints/step-N/  policy/  evaluation.json

Functions that need PyYAML import it themselves: a script tells in a sentence that it is missing.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from minizs import UserError, require
from minizs.runs.flags import given

RUNS = Path("runs")
TRIAL = ".trial-"  # how the names of folders begin that `can_be_made` makes and removes
DONE = Path("policy", "prompt.txt")  # the last file that a run writes: its policy is whole
RESULTS = ("warm_start", "policy")  # beside the checkpoints
TRAINED_WITH = "trained_with.yaml"  # beside the weights of a policy
# The settings that a test of a policy should share with its training. The names are those of flags.
REMEMBERED = (
    "data",
    "corpus",
    "chat_template",
    "chat_template_args",
    "day",
    "top_k",
    "max_turns",
    "max_turn_tokens",
    "max_document_tokens",
    "max_context",
)


# ---- Which folder --------------------------------------------------------------------------------


def new_folder() -> Path:
    """The first free `runs/policy-N`. It is made at once, so that two runs never take the same."""
    for number in count(1):
        folder = RUNS / f"policy-{number}"
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def partial_folder(output: Path) -> Path:
    """Where train_sim.py keeps its results until they are whole."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside, no other process can claim this folder. Raises UserError where one has.

    The system releases the claim when this process ends, however it ends.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"Another run is writing to {folder}; wait for its end, or give another --output."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that is open
            os.unlink(lock.lock_file)
        lock.release()


def to_resume(output: str, resume: str) -> Path:
    """The folder of the run to go on with.

    It is `output`, or the run that the checkpoint `resume` lies in, or the run that began last.
    """
    if output:
        return Path(output)
    if resume != "latest":
        return Path(resume).parent.parent
    newest = max(RUNS.glob("policy-*/config.yaml"), key=os.path.getmtime, default=None)
    return newest.parent if newest else RUNS / "policy-1"


def newest_run() -> Path | None:
    """The run that ended last, told by its finished `policy/` folder."""
    newest = max(RUNS.glob(f"*/{DONE}"), key=os.path.getmtime, default=None)
    return newest.parent.parent if newest else None


def describe_run(folder: Path) -> str:
    """A run in words: where it is, how many steps it has, and when it ended."""
    rows = read_lines(folder / "metrics.jsonl")
    steps = f"{rows[-1]['step']:,} steps" if rows else "no steps"
    ended = datetime.fromtimestamp((folder / DONE).stat().st_mtime)
    return f"the newest run, {folder}: {steps}, ended on {ended:%Y-%m-%d at %H:%M}."


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run, or what `--collect` wrote."""
    return any((folder / name).is_file() for name in ("metrics.jsonl", "collected.jsonl"))


def is_complete(config) -> bool:
    """Whether nothing is left to do for `--resume` without a named checkpoint."""
    return config.resume == "latest" and Path(config.output, DONE).is_file()


# ---- What is refused -----------------------------------------------------------------------------


def check_free(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError for an output folder in which something would be lost."""
    existing = deepest(folder)
    require(existing.is_dir(), f"{existing} is a file; choose another --output.")
    require(not any(map(is_run, folder.parents)), f"{folder} lies in a run; give another --output.")
    require(
        not overwrite or not Path.cwd().is_relative_to(folder.resolve()),
        f"--overwrite would delete {folder}, in which the current folder is; choose another "
        "--output.",
    )
    if not is_empty(folder):
        check_may_lose(folder, resume, overwrite)
    require(can_be_made(folder), f"{existing} cannot be written to; choose another --output.")


def check_may_lose(folder: Path, resume: bool, overwrite: bool) -> None:
    """Only a run is gone on with or deleted, and only where the user says so."""
    require(
        resume or overwrite,
        f"{folder} is not empty; add --resume to go on with it or --overwrite to lose it.",
    )
    require(
        not overwrite or is_run(folder),
        f"{folder} holds no run, so --overwrite leaves it alone; choose another --output.",
    )
    require(
        not resume or is_run(folder) or bool(checkpoints(folder)),
        f"{folder} is not empty and holds no run to go on with; choose another --output.",
    )


def deepest(folder: Path) -> Path:
    """The folder itself if it is there, or the nearest above it that is."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def is_empty(folder: Path) -> bool:
    """Whether the folder is not there or holds nothing that somebody would miss."""
    return not folder.exists() or all(path.name.startswith(TRIAL) for path in folder.iterdir())


def can_be_made(folder: Path) -> bool:
    """Whether a folder can be made, or written into if it is there, found out by trying it.

    Permissions do not tell it: nothing can be made in /proc, or on a disk that is full or
    read-only. It is tried in a folder of another name, so that no other process mistakes it for
    the output.
    """
    folder = folder.resolve()
    existing = deepest(folder)
    before = existing.stat()
    try:
        with TemporaryDirectory(prefix=TRIAL, dir=existing) as trial:
            trial_folder = Path(trial, folder.relative_to(existing))
            trial_folder.mkdir(parents=True, exist_ok=True)
            (trial_folder / "file").touch()
        os.utime(existing, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had been
    except OSError:
        return False
    return True


def check_run_or_settings(folder: Path, argv: list[str], free: set[str]) -> None:
    """Raise UserError for `--resume` where there is no run and no setting for a new one.

    A script that always resumes gives its settings, and so begins the run. Without any, the path
    is probably mistyped. Settings in `free`, such as the number of threads, do not count.
    """
    flags = {word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")}
    require(
        is_run(folder) or bool(checkpoints(folder)) or bool(flags - free),
        f"There is no run in {folder} to resume; check --output. To begin a run there, leave out "
        "--resume or give its settings, too.",
    )


def keep_day(folder: Path, config, argv: list[str]) -> None:
    """Give the settings the day on which a folder's run began, unless the flags give one. The
    default is today, with which a run would go on after midnight with other settings."""
    day = saved_settings(folder / "config.yaml").get("day")
    if day and "day" not in given(type(config), argv):
        config.day = day


def check_unchanged(folder: Path, config, free: set[str]) -> None:
    """Raise UserError if `config` differs from the settings in a folder's config.yaml.

    The folder is a run or a checkpoint. Settings in `free` may differ. A server may have moved: it
    may have another address, and its model another name.
    """
    path = folder / "config.yaml"
    old = saved_settings(path)
    require(
        bool(old) or not checkpoints(folder),
        f"{path} is lost or empty; copy the one of the newest of {folder / 'checkpoints'} there, "
        "or choose another --output.",
    )
    new = asdict(config)
    differences = []
    for name, value in old.items():
        if name in free or new.get(name, value) == value or is_moved_server(name, old, new):
            continue
        differences.append(f"--{name} was {value!r} and is {new[name]!r}")
    require(
        not differences,
        f"{folder} cannot go on with other settings: {', '.join(differences)}. Leave these as they "
        "were, in config.yaml too, or give a new run another --output.",
    )


def has_results(folder: Path) -> bool:
    """Whether anything of a run is kept that its settings have shaped."""
    return bool(checkpoints(folder)) or any((folder / name).exists() for name in RESULTS)


def is_moved_server(name: str, old: dict, new: dict) -> bool:
    """Whether a setting differs because a server moved: its address, its name for a model."""
    if name == "simulator_model":
        name = "simulator"
    return all("://" in str(settings.get(name)) for settings in (old, new))


def saved_settings(path: Path) -> dict:
    """The settings in a config.yaml; empty where there is none."""
    import yaml

    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no YAML any more; write it anew.") from error


# ---- What a policy was trained with --------------------------------------------------------------


def remember_training(policy: Path, config) -> None:
    """Write `policy/trained_with.yaml`: what `evaluate.py` needs to know of the training.

    It holds `base`, the model that training started from, and the settings in `REMEMBERED`, by the
    names of their flags. Paths in `data` and `corpus` are those that were given, so they are
    relative to the folder in which the run was started.
    """
    import yaml

    policy.mkdir(parents=True, exist_ok=True)
    settings = {"base": config.policy}
    for name in REMEMBERED:
        settings[name] = getattr(config, name)
    (policy / TRAINED_WITH).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def trained_with(policy: Path) -> dict:
    """What `remember_training` wrote; empty for a model that no run of ours trained."""
    return saved_settings(policy / TRAINED_WITH)


# ---- Files ---------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict]:
    """The rows of a log. A line that a killed run left unfinished is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def write_lines(path: Path, rows: list[dict], mode: str = "a") -> None:
    """Add rows to a log and wait until they are on the disk. NaN, which JSON lacks, is null."""
    with open(path, mode, encoding="utf-8") as file:
        for row in rows:
            row = json.loads(json.dumps(row), parse_constant=lambda constant: None)
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, values: dict) -> None:
    """Write a small file for people and programs."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def checkpoints(folder: Path) -> list[int]:
    """The steps after which a run was saved, in order. A folder of that name is whole."""
    names = [path.name.removeprefix("step-") for path in folder.glob("checkpoints/step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def begin(folder: Path, step: int = 0, overwrite: bool = False) -> None:
    """Make a run's folder, and drop what is there from after `step`.

    The newest checkpoints go first, and a log is replaced in one go. So a run that is killed in
    here can be resumed like any other.
    """
    if overwrite:
        remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number in reversed(checkpoints(folder)):
        if number > step:
            remove(folder / "checkpoints" / f"step-{number}")
    for path in folder.glob("*.jsonl"):
        rows = [row for row in read_lines(path) if row.get("step", 0) <= step]
        partial = path.with_suffix(".partial")
        write_lines(partial, rows, "w")
        partial.replace(path)


def move(folder: Path, target: Path) -> None:
    """Rename a folder in one step. Raises UserError where something has come there meanwhile."""
    if target.exists():
        empty = target.is_dir() and not any(target.iterdir())
        require(empty, f"{target} is not empty any more, so the whole result is in {folder}.")
        target.rmdir()  # which Windows does not do by itself
    folder.rename(target)


def remove(folder: Path) -> None:
    """Delete a folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
