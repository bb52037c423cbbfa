"""Save, resume, and stop in time. A checkpoint is a folder `checkpoints/step-N`, whole or none.

All randomness is a function of (seed, step, question, sample, ...), so that models, optimisers and
the number of the step are the whole state. Weights are safetensors. The states of optimisers, and
the weights of models that were sharded, are read by `torch.load(weights_only=True)`, which builds
tensors and runs nothing. A copy of the run's config.yaml says with what the weights were trained.
"""

import json
import logging
import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils.constants import RNG_STATE_NAME

from minizs import UserError, brief, require
from minizs.runs.flags import may_change
from minizs.runs.metrics import total
from minizs.runs.run_folder import check_unchanged, checkpoints, remove, write_lines

SUMS = "checksums.json"  # of all files; written last
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # "tied weights saved once"


def save_checkpoint(accelerator, run: Path, step: int, keep: int = 2) -> None:
    """Write what Accelerate prepared as `checkpoints/step-N`, and drop all but the newest `keep`.

    All processes call this together. Step 0, and a step that is saved already, are left alone.
    """
    folder = run / "checkpoints"
    partial = folder / "partial"
    whole = folder / f"step-{step}"
    if step == 0 or whole.exists():
        return
    if accelerator.is_main_process:
        remove(partial)  # left by a run that was killed here
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in partial.glob(f"{RNG_STATE_NAME}_*"):
            path.unlink()  # no random number here depends on a generator's state
        if (run / "config.yaml").is_file():
            shutil.copyfile(run / "config.yaml", partial / "config.yaml")
        sums = checksums(partial)
        for name in sums:
            wait_for_disk(partial / name)
        write_lines(partial / SUMS, [sums])
        partial.rename(whole)
        for old in checkpoints(run)[:-keep]:
            remove(folder / f"step-{old}")
    accelerator.wait_for_everyone()


def checksums(folder: Path) -> dict[str, int]:
    """The checksum of each file below a folder, by its path in there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def wait_for_disk(path: Path) -> None:
    """Return once a file is on the disk. Windows does this only for files opened for writing."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value


def is_whole(path: Path) -> bool:
    """Whether each file of a checkpoint is what was saved."""
    try:
        sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
        return all(checksum(path / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def find_checkpoint(resume: str, run: Path) -> Path | None:
    """The checkpoint that `--resume` means.

    It is a named one, or, for "latest", the newest without damage; None if there is none. Raises
    UserError for a named one that is damaged or does not belong to this run.
    """
    paths = [run / "checkpoints" / f"step-{step}" for step in reversed(checkpoints(run))]
    if resume != "latest":
        paths = [path for path in paths if path.resolve() == Path(resume).resolve()]
        require(bool(paths), f"There is no checkpoint {resume} in {run}; give its run as --output.")
    for path in paths:
        if is_whole(path):
            return path
        require(resume == "latest", f"{path} is damaged; --resume alone finds a whole one.")
        if os.environ.get("RANK", "0") == "0":  # of several processes, one says so
            print(f"Warning: the checkpoint {path} is damaged and skipped.")
    return None


def checkpoint_of(config) -> Path | None:
    """The checkpoint that a run goes on from; None for a run that begins with its first step.

    Raises UserError if config.yaml was edited since, for example: the weights were trained with
    other settings.
    """
    if not config.resume:
        return None
    path = find_checkpoint(config.resume, Path(config.output))
    if path:
        check_unchanged(path, config, may_change(config))
    return path


def step_of(path: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(accelerator, path: Path) -> int:
    """Restore what Accelerate prepared. Returns the step done last. Raises UserError."""
    try:
        accelerator.load_state(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be loaded, go on from another: {brief(error)}") from error
    return step_of(path)


@contextmanager
def stopping() -> Iterator[Callable]:
    """Inside, Ctrl-C and SIGTERM wait for the end of a step; a second Ctrl-C does not.

    Yields `should_stop(accelerator)`: whether any process has been told to stop. All processes
    have to call it together.
    """
    signals = []

    def note(number: int, frame) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def should_stop(accelerator) -> bool:
        return total(accelerator, len(signals)) > 0

    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, note)
    try:
        yield should_stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
