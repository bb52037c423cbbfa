"""Save, resume, and stop in time. A checkpoint is a folder `checkpoints/step-N`, whole or none.

All randomness is a function of (seed, step, question, sample, ...), so models, optimisers and the
step number are the whole state: there is no generator or data cursor to save. Weights are
safetensors; for the optimisers' states Accelerate uses `torch.load(weights_only=True)`, which
builds tensors and runs nothing.
"""

import json
import logging
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minizs.config import UserError, brief, require
from minizs.metrics import total
from minizs.runs import remove

DONE = "step.json"  # the step, whether the weights are sharded, and a checksum of each file
# Tied weights are saved once, as they should be: no line about it amid the progress bar.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def save(accelerator, folder: Path, step: int, keep: int = 2) -> None:
    """Write all that Accelerate prepared as `folder/step-N`, if it is not there (nor is N 0); drop
    all but the newest `keep`."""
    if step == 0 or (folder / f"step-{step}").exists():
        return
    partial = folder / f"partial-{step}"
    if accelerator.is_main_process:
        for left in folder.glob("partial-*"):  # by a run that was killed here
            remove(left)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        sums = {str(path.relative_to(partial)): checksum(path) for path in files}
        mark = {"step": step, "sharded": accelerator.is_fsdp2, "files": sums}
        (partial / DONE).write_text(json.dumps(mark))
        for path in [*files, partial / DONE]:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        partial.rename(folder / f"step-{step}")
        for old in complete(folder)[:-keep]:
            remove(old)
    accelerator.wait_for_everyone()


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value


def complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first. Renaming made each whole; see `damage`."""
    return sorted(folder.glob("step-*[0-9]"), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def damage(path: Path) -> str:
    """What has happened to a checkpoint since it was saved; "" if nothing."""
    try:
        for name, expected in json.loads((path / DONE).read_text())["files"].items():
            if checksum(path / name) != expected:
                return f"{name} is not what was saved"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: a named one, or ("latest") the newest without damage,
    None if none. Raises UserError for one that is damaged, or not in `folder`."""
    if resume == "latest":
        for path in reversed(complete(folder)):
            if not (reason := damage(path)):
                return path
            if os.environ.get("RANK", "0") == "0":  # of several processes, one says so
                print(f"Warning: the checkpoint {path} is damaged and skipped: {reason}")
        return None
    path = Path(resume)
    require(path.is_dir(), f"There is no checkpoint {resume}; --resume alone takes the newest.")
    require(path.resolve().parent == folder.resolve(), f"The checkpoint {resume} does not lie in "
            f"{folder}; give its own run's folder as --output.")  # fmt: skip
    require(not (reason := damage(path)), f"The checkpoint {resume} is damaged ({reason}); "
            "--resume alone takes the newest whole one.")  # fmt: skip
    return path


def cut(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`, the newest first: a resumed run writes them again."""
    for path in reversed(complete(folder)):
        if step_of(path) > step:
            remove(path)


def load(accelerator, path: Path) -> int:
    """Restore all that Accelerate prepared; the step that was done last. Raises UserError."""
    sharded = json.loads((path / DONE).read_text())["sharded"]
    require(sharded == accelerator.is_fsdp2, f"{path} was saved {'with' if sharded else 'without'} "
            "FSDP2; go on with the same launcher settings.")  # fmt: skip
    try:
        accelerator.load_state(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be loaded, go on from another: {brief(error)}") from error
    return step_of(path)


@contextmanager
def stopping() -> Iterator[Callable]:
    """Ctrl-C and SIGTERM wait for the end of a step; a second Ctrl-C does not. Yields a function of
    the accelerator: whether any process has been told to stop. All processes call it together."""
    seen = []

    def note(number: int, frame) -> None:
        if signal.SIGINT in seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    def asked(accelerator) -> bool:
        return total(accelerator, len(seen)) > 0

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
