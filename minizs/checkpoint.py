"""Save and resume. A checkpoint is a folder `checkpoints/step-N`, written whole or not at all.

All randomness is a function of (seed, step, question, sample, ...), so models, optimisers and the
step number are the whole state: there is no generator or data cursor to save.
"""

import json
import shutil
from pathlib import Path

from minizs.config import UserError

DONE = "step.json"  # written last: its presence marks a complete checkpoint


def save(accelerator, folder: Path, step: int, keep: int = 2) -> None:
    """Write all that Accelerate prepared as `folder/step-N`; drop all but the newest `keep`."""
    final, partial = folder / f"step-{step}", folder / f"partial-{step}"
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / DONE).write_text(json.dumps({"step": step}))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("step-*") if (p / DONE).is_file()]
    return sorted(found, key=lambda p: json.loads((p / DONE).read_text())["step"])


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume` means: a named one, or the newest ("latest"), None if none."""
    if resume == "latest":
        return next(reversed(complete(folder)), None)
    path = Path(resume)
    if not (path / DONE).is_file():
        raise UserError(
            f"{resume} is no complete checkpoint; --resume alone takes the newest there is."
        )
    return path


def load(accelerator, path: Path) -> int:
    """Restore all that Accelerate prepared; the step that was done last."""
    accelerator.load_state(str(path))
    return json.loads((path / DONE).read_text())["step"]
