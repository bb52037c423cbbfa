"""Save, resume, and stop in time. A checkpoint is a folder `checkpoints/step-N`, whole or none.

All randomness is a function of (seed, step, question, sample, ...), so models, optimisers and the
step number are the whole state. Weights are safetensors; optimisers' states, and the weights of
models that were sharded, are read by `torch.load(weights_only=True)`: it only builds tensors."""

import json
import logging
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minizs import UserError, brief, require
from minizs.runs.metrics import total
from minizs.runs.run_folder import checkpoints, remove, write_lines

SUMS = "checksums.json"  # of all files; written last
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # "tied weights saved once"


def save(accelerator, run: Path, step: int, keep: int = 2) -> None:
    """Write what Accelerate prepared as `checkpoints/step-N`; drop all but the newest `keep`."""
    folder = run / "checkpoints"
    partial, whole = folder / "partial", folder / f"step-{step}"
    if step == 0 or whole.exists():
        return
    if accelerator.is_main_process:
        remove(partial)  # by a run that was killed here
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = [path for path in partial.rglob("*") if path.is_file()]
        sums = {}
        for path in files:
            wait_for_disk(path)
            sums[path.relative_to(partial).as_posix()] = checksum(path)
        write_lines(partial / SUMS, [sums])
        partial.rename(whole)
        for old in checkpoints(run)[:-keep]:
            remove(folder / f"step-{old}")
    accelerator.wait_for_everyone()


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


def find(resume: str, run: Path) -> Path | None:
    """The checkpoint that `--resume` means: a named one, or ("latest") the newest without damage,
    None if none. Raises UserError for one that is damaged, or not this run's."""
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


def load(accelerator, path: Path) -> int:
    """Restore all that Accelerate prepared; the step that was done last. Raises UserError."""
    try:
        accelerator.load_state(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be loaded, go on from another: {brief(error)}") from error
    return int(path.name[5:])


@contextmanager
def stopping() -> Iterator[Callable]:
    """Ctrl-C and SIGTERM wait for the end of a step; a second Ctrl-C does not. Yields a function of
    the accelerator: whether any process has been told to stop. All processes call it together."""
    seen = []

    def note(number: int, frame) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda accelerator: total(accelerator, len(seen)) > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
