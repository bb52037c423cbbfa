"""The folder of a run: where it is, what is written into it, and in which order.

config.yaml  metrics.jsonl  trajectories.jsonl  checkpoints/  policy/
"""

import json
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import yaml

from minizs.config import UserError
from minizs.trajectory import Trajectory

RUNS = Path("runs")
DONE = Path("policy", "prompt.txt")  # what `models.save` writes last: the policy is whole


def output_folder(kind: str, resume: str) -> Path:
    """The first free `runs/KIND-N`; to resume, a named checkpoint's run or the last that is there.

    A checkpoint is `RUN/checkpoints/step-N`.
    """
    if resume not in ("", "latest"):
        return Path(resume).parent.parent
    numbers = [p.name.rsplit("-", 1)[-1] for p in RUNS.glob(f"{kind}-*")]
    last = max((int(n) for n in numbers if n.isdigit()), default=0)
    return RUNS / f"{kind}-{max(1, last) if resume else last + 1}"


def own_settings(output: str, resume: str) -> list[str]:
    """The flags that give a run that is resumed the settings in its `config.yaml`, if any."""
    path = (Path(output) if output else output_folder("policy", resume)) / "config.yaml"
    return ["--config", str(path)] if path.is_file() else []


def check_free(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError for an output folder in which something would be lost."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder.")
    if folder.exists() and any(folder.iterdir()) and not (resume or overwrite):
        raise UserError(
            f"{folder} is not empty; add --resume to go on with it or --overwrite to lose it."
        )
    if overwrite and Path.cwd().is_relative_to(folder.resolve()):
        raise UserError("--overwrite would delete the current folder; choose another --output.")


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def newest_run() -> Path | None:
    """The run that ended last, told by its finished `policy/` folder."""
    done = [p for p in RUNS.glob("*") if (p / DONE).is_file()]
    return max(done, key=lambda p: (p / DONE).stat().st_mtime, default=None)


def finished(folder: Path, steps: int) -> bool:
    """Whether this run has done all its steps and saved its policy."""
    return (folder / DONE).is_file() and RunFolder(folder).last_step() >= steps


def started_from(policy: Path) -> str | None:
    """The model that a run's policy was trained from, as its settings say."""
    settings = policy.parent / "config.yaml"
    if not settings.is_file():
        return None
    return (yaml.safe_load(settings.read_text()) or {}).get("policy")


def read_lines(path: Path) -> list[dict]:
    """The rows of a log; a line that a killed run left unfinished is passed over."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line, parse_constant=lambda _: None))  # NaN and infinities
    return rows


class RunFolder:
    """Appends to a run's two logs: one line a training step, one line a trajectory shown."""

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        self.folder = folder
        if overwrite:
            remove(folder)
        folder.mkdir(parents=True, exist_ok=True)

    def last_step(self) -> int:
        """The last step that was logged, 0 where there is none."""
        return max((row["step"] for row in read_lines(self.folder / "metrics.jsonl")), default=0)

    def cut(self, step: int) -> None:
        """Drop the lines after `step`: a resumed run writes them again."""
        for name in ("metrics.jsonl", "trajectories.jsonl"):
            rows = [row for row in read_lines(self.folder / name) if row["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (self.folder / name).write_text(text)

    def write_metrics(self, metrics: dict) -> None:
        self._append("metrics.jsonl", metrics)

    def write_trajectories(self, step: int, trajectories: list[Trajectory]) -> None:
        for trajectory in trajectories:
            self._append("trajectories.jsonl", {"step": step} | asdict(trajectory))

    def _append(self, name: str, row: dict) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(row) + "\n")
