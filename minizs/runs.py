"""The folder of a run: where it is, what is written into it, and in which order.

config.yaml  metrics.jsonl  trajectories.jsonl  suspects.jsonl  checkpoints/  policy/
"""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path

import yaml

from minizs.config import require

RUNS = Path("runs")
DONE = Path("policy", "prompt.txt")  # what `models.save` writes last: the policy is whole
MARKS = ("config.yaml", "metrics.jsonl", "settings.yaml", "collected.jsonl")  # one is in each run's


def _last(kind: str) -> int:
    numbers = [p.name.rsplit("-", 1)[-1] for p in RUNS.glob(f"{kind}-*")]
    return max((int(n) for n in numbers if n.isdigit()), default=0)


def new_folder(kind: str) -> Path:
    """The first free `runs/KIND-N`, made at once: two runs started together take two."""
    for number in count(_last(kind) + 1):
        folder = RUNS / f"{kind}-{number}"
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def to_resume(kind: str, output: str, resume: str) -> Path:
    """The run to go on with: `--output`, that of `RUN/checkpoints/step-N`, or the last there is."""
    named = Path(resume).parent.parent if resume != "latest" else None
    return Path(output) if output else named or RUNS / f"{kind}-{max(1, _last(kind))}"


def own_settings(folder: Path) -> list[str]:
    """The flags that give a run that is resumed the settings in its `config.yaml`, if any."""
    path = folder / "config.yaml"
    return ["--config", str(path)] if path.is_file() else []


def check_unchanged(folder: Path, config, free: set[str]) -> None:
    """Raise UserError, with every difference, for a run that would go on with other settings than
    those in its `config.yaml`; the `free` ones may change."""
    path, ours = folder / "config.yaml", asdict(config)
    theirs = yaml.safe_load(path.read_text()) if path.is_file() else {}
    changed = [f"--{name} was {value!r} and is {ours[name]!r}" for name, value in theirs.items()
               if name not in free and ours.get(name, value) != value]  # fmt: skip
    require(not changed, f"{folder} cannot go on with other settings: {', '.join(changed)}. Leave "
            "these as they were, or give a new run another --output.")  # fmt: skip


def check_free(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError for an output folder in which something would be lost."""
    for path in (folder, *folder.parents):
        require(path.is_dir() or not path.exists(), f"{path} is a file; --output names a folder.")
        within = path != folder and any((path / name).is_file() for name in MARKS)
        require(not within, f"{folder} lies in the run {path}; choose another --output.")
    if folder.exists() and any(folder.iterdir()):
        require(resume or overwrite, f"{folder} is not empty; add --resume to go on with it or "
                "--overwrite to lose it.")  # fmt: skip
        ours = any((folder / name).is_file() for name in MARKS)
        require(ours or not overwrite, f"{folder} holds no run, so --overwrite leaves it alone; "
                "choose another --output.")  # fmt: skip
    inside = overwrite and Path.cwd().is_relative_to(folder.resolve())
    require(not inside, "--overwrite would delete the current folder; choose another --output.")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    require(os.access(there, os.W_OK), f"{there} cannot be written to; choose another --output.")


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def newest_run() -> Path | None:
    """The run that ended last, told by its finished `policy/` folder."""
    done = max(RUNS.glob(f"*/{DONE}"), key=lambda path: path.stat().st_mtime, default=None)
    return done and done.parent.parent


def started_from(policy: Path) -> str | None:
    """The model that a run's policy was trained from, None if no settings beside it name one."""
    try:
        name = yaml.safe_load((policy.parent / "config.yaml").read_text())["policy"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):  # not a run's file
        return None
    return name if isinstance(name, str) else None


def parse(line: str | bytes) -> dict:
    return json.loads(line, parse_constant=lambda _: None)  # NaN and infinities are no JSON


def read_lines(path: Path) -> list[dict]:
    """The rows of a log; a line that a killed run left unfinished is passed over."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(parse(line))
    return rows


class RunFolder:
    """A run's logs: a line of metrics a training step, a line a trajectory shown or suspected."""

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        if overwrite:
            remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def cut(self, step: int) -> None:
        """Drop the lines after `step`: a resumed run writes them again."""
        for path in self.folder.glob("*.jsonl"):
            rows = [row for row in read_lines(path) if row.get("step", 0) <= step]
            self._write(partial := path.with_suffix(".partial"), rows, "w")
            partial.replace(path)  # in one go: a run killed here keeps its log

    def write_metrics(self, metrics: dict) -> None:
        self._write(self.folder / "metrics.jsonl", [metrics])

    def write_trajectories(self, step: int, rows: list[dict], name: str = "trajectories") -> None:
        self._write(self.folder / f"{name}.jsonl", [{"step": step} | row for row in rows])

    def _write(self, path: Path, rows: list[dict], mode: str = "a") -> None:
        with open(path, mode) as file:
            file.writelines(json.dumps(parse(json.dumps(row))) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
