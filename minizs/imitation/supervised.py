"""Supervised learning that can be stopped and resumed: one loop for train_sim.py and a warm start.

The folder of such a training holds `config.yaml`, `metrics.jsonl` (`step` and `loss`) and
`checkpoints/`. The order of the texts is a function of the seed, so that a resumed training ends
with the weights of an unbroken one.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from minizs import sft
from minizs.runs import checkpoint, run_folder
from minizs.runs.flags import save_settings


@dataclass(frozen=True)
class Schedule:
    """What the loop needs to know of the settings."""

    steps: int
    batch_tokens: int  # positions a step, over all processes, padding counted
    lr: float  # the peak
    warmup: float  # the share of the steps in which the learning rate rises
    max_grad_norm: float
    seed: int
    save_every: int  # steps between checkpoints; 0: none
    keep: int  # how many checkpoints are kept


def start_or_resume(accelerator, folder: Path, config, saved: Path | None) -> int:
    """Make the folder ready, and restore the checkpoint `saved`, if there is one. Returns the step
    that was done last. Whatever the folder holds from after that step is dropped."""
    last_step = checkpoint.load_checkpoint(accelerator, saved) if saved else 0
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        beginning = f"Going on from step {last_step} of" if saved else "A new run in"
        print(f"{beginning} {folder}.")
        run_folder.begin(folder, last_step)
        if not saved:
            save_settings(config, folder / "config.yaml")
    return last_step


def train(
    schedule: Schedule,
    accelerator,
    model,
    optimizer,
    texts: list[sft.Tokens],
    folder: Path,
    last_step: int,
    go_on: str,
) -> None:
    """Steps `last_step` + 1 to `schedule.steps` on these texts; each writes a line of metrics.

    `model` (a `sft.Supervised`) and `optimizer` are those that Accelerate prepared. After a signal
    the step is saved and SystemExit is raised, which tells the command `go_on` that resumes the
    training.
    """
    batches = sft.endless_batches(texts, schedule.batch_tokens, schedule.seed)
    remaining = islice(batches, last_step, schedule.steps)
    is_main = accelerator.is_main_process
    bar = tqdm(total=schedule.steps, initial=last_step, disable=not is_main, dynamic_ncols=True)
    with bar, checkpoint.stopping() as should_stop:
        for step, rows in enumerate(remaining, last_step + 1):
            for group in optimizer.param_groups:
                group["lr"] = sft.learning_rate(step, schedule.steps, schedule.lr, schedule.warmup)
            loss = sft.train_step(accelerator, model, optimizer, rows, schedule.max_grad_norm)
            if is_main:
                run_folder.write_lines(folder / "metrics.jsonl", [{"step": step, "loss": loss}])
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()
            stop = should_stop(accelerator)
            is_due = schedule.save_every and step % schedule.save_every == 0
            if stop or is_due:
                checkpoint.save_checkpoint(accelerator, folder, step, schedule.keep)
            if stop:
                sentence = f"Stopped after step {step}, which is saved. Go on with: {go_on}"
                raise SystemExit(sentence if is_main else accelerator.process_index)
