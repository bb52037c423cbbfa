"""Save and resume. A checkpoint is a folder `checkpoints/step-N`, written whole or not at all.

All randomness is a function of (seed, step, question, sample, ...), so models, optimisers and the
step number are the whole state: there is no generator or data cursor to save.
"""

import json
import logging
from pathlib import Path

from minizs.config import require
from minizs.runs import remove

DONE = "step.json"  # written last: its presence marks a complete checkpoint
# Tied weights are saved once, as they should be: no line about it amid the progress bar.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def save(accelerator, folder: Path, step: int, keep: int = 2, kind: dict | None = None) -> None:
    """Write all that Accelerate prepared as `folder/step-N`; drop all but the newest `keep`.
    `kind` is what the settings of a run that loads it have to agree with."""
    final, partial = folder / f"step-{step}", folder / f"partial-{step}"
    if accelerator.is_main_process:
        remove(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / DONE).write_text(json.dumps({"step": step, "kind": kind or {}}))
        remove(final)
        partial.rename(final)
        for old in complete(folder)[:-keep]:
            remove(old)
    accelerator.wait_for_everyone()


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted((mark.parent for mark in folder.glob(f"step-*/{DONE}")), key=step_of)


def step_of(path: Path) -> int:
    return json.loads((path / DONE).read_text())["step"]


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: a named one, or the newest ("latest"), None if none.
    Raises UserError for one that is not there, or in another run's folder than `folder`."""
    if resume == "latest":
        return next(reversed(complete(folder)), None)
    path = Path(resume)
    require((path / DONE).is_file(), f"{resume} is no complete checkpoint; --resume alone takes "
            "the newest there is.")  # fmt: skip
    require(path.resolve().parent == folder.resolve(), f"The checkpoint {resume} does not lie in "
            f"{folder}; give its own run's folder as --output.")  # fmt: skip
    return path


def cut(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`: as with the logs, a resumed run writes them again."""
    for path in complete(folder):
        if step_of(path) > step:
            remove(path)


def load(accelerator, path: Path, kind: dict | None = None) -> int:
    """Restore all that Accelerate prepared; the step that was done last. Raises UserError for a
    checkpoint of another kind."""
    theirs = json.loads((path / DONE).read_text())["kind"]
    require(theirs == (kind or {}), f"{path} was written by a run with {theirs}, this one has "
            f"{kind}; go on with the same settings.")  # fmt: skip
    accelerator.load_state(str(path))
    return step_of(path)
