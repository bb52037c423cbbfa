"""The files that an evaluation writes. Two that run at once never choose the same ones.

OUT.json           the figures
OUT.md             the table
OUT.jsonl          every trajectory of the policy, OUT.before.jsonl of what it is compared with
OUT.noisy.jsonl    those of the test with noisy replies, and OUT.before.noisy.jsonl
OUT.unfinished/    the answers so far; whoever holds the lock in it owns OUT
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from minizs import UserError, require
from minizs.runs.data import split_spec
from minizs.runs.run_folder import can_be_made
from minizs.runs.settings import EvalConfig

SUFFIXES = (
    ".json",
    ".md",
    ".jsonl",
    ".before.jsonl",
    ".noisy.jsonl",
    ".before.noisy.jsonl",
)
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Output:
    """Where an evaluation writes: its figures, and its answers until they are complete."""

    figures: Path
    answers: Path  # a folder

    def beside(self, suffix: str) -> Path:
        """The file that has the figures' name and another suffix."""
        return self.figures.with_suffix(suffix)


def default_paths(policy: str) -> Iterator[Path]:
    """evaluation.json, evaluation-2.json, ... beside a policy's folder or file, or here for a hub
    name."""
    folder = Path(policy).parent if policy and Path(policy).exists() else Path()
    for number in count(1):
        yield folder / ("evaluation.json" if number == 1 else f"evaluation-{number}.json")


def check_figures_path(config: EvalConfig) -> None:
    """Raise UserError where nothing can be written, or something would be lost."""
    path = Path(config.output) if config.output else next(default_paths(config.policy))
    is_place = path.parent.is_dir() and can_be_made(path.parent) and not path.is_dir()
    require(
        path.suffix == ".json" and is_place,
        f"--output {path}: no .json file can be written there.",
    )
    if not config.output:
        return
    check_may_write(config, path)


def check_may_write(config: EvalConfig, path: Path) -> None:
    """Raise UserError where files of this output exist that are read, or may not be lost."""
    existing = [file for file in map(path.with_suffix, SUFFIXES) if file.exists()]
    inputs = [*split_spec(config.data), config.corpus, config.cache]
    real_inputs = {os.path.realpath(name) for name in inputs}
    for file in existing:
        require(
            os.path.realpath(file) not in real_inputs,
            f"--output {path} would overwrite {file}, which is read; give another --output.",
        )
    require(
        config.overwrite or not existing,
        f"{'; '.join(map(str, existing))} exists; give another --output, or --overwrite to lose "
        "what is there.",
    )


@contextmanager
def claimed_output(config: EvalConfig, accelerator, fingerprint: str) -> Iterator[Output]:
    """The output, which no other evaluation can have at the same time. Raises UserError.

    `fingerprint` tells evaluations apart: what one has answered is not taken for another's. By
    default the output is the first free name, or the one at which the same evaluation was
    interrupted. At the end the unfinished answers are deleted.
    """
    from accelerate.utils import broadcast_object_list

    lock = None
    path = None
    if accelerator.is_main_process:
        lock, path = _claim(config, fingerprint)
    [path] = broadcast_object_list([path])
    try:
        yield Output(path, _answers_folder(path))
    finally:
        if lock:
            lock.release()
    if accelerator.is_main_process:
        shutil.rmtree(_answers_folder(path))


def _claim(config: EvalConfig, fingerprint: str) -> tuple[Any, Path]:
    """A lock, and the path that it gives a right to."""
    if config.output:
        lock = _try_to_lock(Path(config.output))
        require(
            lock is not None,
            f"Another evaluation is writing {config.output}; give another --output.",
        )
        try:
            check_may_write(config, Path(config.output))  # another may have ended meanwhile
        except UserError:
            lock.release()
            shutil.rmtree(_answers_folder(Path(config.output)), ignore_errors=True)
            raise
        return lock, Path(config.output)
    for path in default_paths(config.policy):
        if path.exists() or _belongs_to_another(path, fingerprint):
            continue
        lock = _try_to_lock(path)
        if lock and not path.exists():
            return lock, path
        if lock:  # another has finished meanwhile
            lock.release()
            shutil.rmtree(_answers_folder(path), ignore_errors=True)
    raise AssertionError("there is always another number")


def _answers_folder(path: Path) -> Path:
    return path.with_suffix(UNFINISHED)


def _belongs_to_another(path: Path, fingerprint: str) -> bool:
    """Whether there are unfinished answers, and none of them are this evaluation's."""
    names = [file.name for file in _answers_folder(path).glob("*.jsonl.*")]
    return bool(names) and not any(name.startswith(fingerprint) for name in names)


def _try_to_lock(path: Path) -> Any | None:
    """The lock of an output, which the system releases when this process ends, however it ends;
    None where another process has it."""
    from filelock import FileLock, Timeout

    folder = _answers_folder(path)
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock
