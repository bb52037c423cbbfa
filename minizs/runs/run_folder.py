"""The folder of a run: where it is, what is written into it, and in which order.

config.yaml  metrics.jsonl  trajectories.jsonl  suspects.jsonl  cost.json  report.html
checkpoints/step-N/  policy/  evaluation.json
"""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from minizs import require

RUNS = Path("runs")
TRIAL = ".trial-"  # how the names of folders begin that `can_be_made` makes and removes
DONE = Path("policy", "prompt.txt")  # what `models.save` writes last: the policy is whole


def new_folder() -> Path:
    """The first free `runs/policy-N`, made at once: two runs started together take two."""
    for number in count(1):
        with suppress(FileExistsError):
            (folder := RUNS / f"policy-{number}").mkdir(parents=True)
            return folder


def partial_folder(output: Path) -> Path:
    """Where train_sim.py keeps its results until they are whole."""
    return output.with_name(f"{output.name}.partial")


def to_resume(output: str, resume: str) -> Path:
    """The run to go on with: `--output`, that of `RUN/checkpoints/step-N`, or the last begun."""
    if output or resume != "latest":
        return Path(output or Path(resume).parent.parent)
    begun = max(RUNS.glob("policy-*/config.yaml"), key=os.path.getmtime, default=None)
    return begun.parent if begun else RUNS / "policy-1"


def check_unchanged(folder: Path, config, free: set[str]) -> None:
    """Raise UserError, with each difference, if settings changed that are not `free`."""
    import yaml

    path, ours = folder / "config.yaml", asdict(config)
    theirs = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}) or {}
    require(
        bool(theirs) or not checkpoints(folder),
        f"{path} is lost or empty: write into it what "
        "this run was started with, or choose another --output.",
    )
    changed = [
        f"--{name} was {value!r} and is {ours[name]!r}"
        for name, value in theirs.items()
        if name not in free
        and ours.get(name, value) != value
        and not all("://" in str(v) for v in (value, ours[name]))
    ]  # a server may move
    require(
        not changed,
        f"{folder} cannot go on with other settings: {', '.join(changed)}. Leave "
        "these as they were, or give a new run another --output.",
    )


def check_free(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError for an output folder in which something would be lost."""
    there = deepest(folder)
    require(there.is_dir(), f"{there} is a file; choose another --output.")
    require(not any(map(is_run, folder.parents)), f"{folder} lies in a run; give another --output.")
    if folder.exists():
        empty = all(path.name.startswith(TRIAL) for path in folder.iterdir())
        require(
            empty or resume or overwrite,
            f"{folder} is not empty; add --resume to go on with it or --overwrite to lose it.",
        )
        ours = (empty or is_run(folder)) and not Path.cwd().is_relative_to(folder.resolve())
        require(
            ours or not overwrite,
            f"{folder} holds no run, or the current folder, so "
            "--overwrite leaves it alone; choose another --output.",
        )
    require(can_be_made(folder), f"{there} cannot be written to; choose another --output.")


def deepest(folder: Path) -> Path:
    """The folder itself if it is there, or the nearest above it that is."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def can_be_made(folder: Path) -> bool:
    """Whether a folder can be made, or written into if it is there, found out by trying it.

    Permissions do not tell it: nothing can be made in /proc, or on a disk that is full or
    read-only. It is tried in a folder of another name, so that no other process mistakes it for
    the output."""
    folder = folder.resolve()
    there = deepest(folder)
    before = there.stat()
    try:
        with TemporaryDirectory(prefix=TRIAL, dir=there) as trial:
            trial_folder = Path(trial, folder.relative_to(there))
            trial_folder.mkdir(parents=True, exist_ok=True)
            (trial_folder / "file").touch()
        os.utime(there, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had been
    except OSError:
        return False
    return True


def move(folder: Path, target: Path) -> None:
    """Rename a folder in one step. Raises OSError where the target is there and not empty."""
    if target.exists():
        target.rmdir()  # which Windows does not do by itself
    folder.rename(target)


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.jsonl", "collected.jsonl"))


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def newest_run() -> Path | None:
    """The run that ended last, told by its finished `policy/` folder."""
    done = max(RUNS.glob(f"*/{DONE}"), key=os.path.getmtime, default=None)
    return done and done.parent.parent


def describe(folder: Path) -> str:
    """A run in words: where it is, how many steps it has, and when it ended."""
    rows = read_lines(folder / "metrics.jsonl")
    steps = f"{rows[-1]['step']:,} steps" if rows else "no steps"
    ended = datetime.fromtimestamp((folder / DONE).stat().st_mtime)
    return f"the newest run, {folder}: {steps}, ended on {ended:%Y-%m-%d at %H:%M}."


TRAINED_WITH = "trained_with.yaml"  # beside the weights of a policy
# The settings that a test of a policy should share with its training. The names are those of flags.
REMEMBERED = (
    "data",
    "corpus",
    "chat_template",
    "top_k",
    "max_turns",
    "max_turn_tokens",
    "max_document_tokens",
    "max_context",
)


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
    import yaml

    path = policy / TRAINED_WITH
    if not path.is_file():
        return {}
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """The rows of a log; a line that a killed run left unfinished is passed over."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def write_lines(path: Path, rows: list[dict], mode: str = "a") -> None:
    """Add rows to a log and wait until they are on the disk."""
    with open(path, mode, encoding="utf-8") as file:
        for row in rows:
            row = json.loads(json.dumps(row), parse_constant=lambda _: None)  # NaN is no JSON
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def checkpoints(folder: Path) -> list[int]:
    """The steps after which a run was saved, in order. Each is whole: renaming made it."""
    paths = folder.glob("checkpoints/step-*")
    return sorted(int(path.name[5:]) for path in paths if path.name[5:].isdecimal())


def begin(folder: Path, step: int = 0, overwrite: bool = False) -> None:
    """Make a run's folder; drop what is there from after `step`, the newest checkpoints first."""
    if overwrite:
        remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number in reversed([number for number in checkpoints(folder) if number > step]):
        remove(folder / "checkpoints" / f"step-{number}")
    for path in folder.glob("*.jsonl"):
        rows = [row for row in read_lines(path) if row.get("step", 0) <= step]
        write_lines(partial := path.with_suffix(".partial"), rows, "w")
        partial.replace(path)  # in one go: a run killed here keeps its log
