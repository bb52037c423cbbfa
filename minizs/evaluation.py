"""Stage 3 as a function: questions in, EM, substring match and F1 with their standard errors out.

Every row counts, also one that never answered. Greedy by default (the paper's code sampled, defect
D5), and EM is equality after normalisation (the paper's code tests for a substring, D4).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev

from minizs.metrics import searched_again
from minizs.reward import exact_match, f1_score, substring_match
from minizs.runs import read_lines
from minizs.trajectory import Example, Trajectory, Turn

METRICS = {"f1": f1_score, "em": exact_match, "sub_em": substring_match}
Answer = Callable[..., list[Trajectory]]  # (examples, keys=...) -> one trajectory each


def answer_all(answer: Answer, examples: Sequence[Example], accelerator, batch: int = 250,
               kept: Path | None = None) -> list[Trajectory] | None:  # fmt: skip
    """One trajectory for each example, in order, over all processes: None but on the main one.

    Every example is answered exactly once, with its index as its key, so that neither batch nor
    processes change an answer. With `kept` each batch is appended to a file `kept.RANK` when it is
    done: called again after an interruption, with any number of processes, it goes on from there.
    Of a trajectory the text is kept, not the tokens.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    rank, world, mine = accelerator.process_index, accelerator.num_processes, {}
    files = kept.parent.glob(f"{kept.name}.*") if kept else []
    done = {row["index"]: from_row(row) for file in files for row in read_lines(file)}
    accelerator.wait_for_everyone()  # all have read before one writes
    todo = [i for i in range(len(examples)) if i not in done][rank::world]
    for start in tqdm(range(0, len(todo), batch), disable=not kept or rank > 0, leave=False):
        some = todo[start : start + batch]
        rows = answer([examples[i] for i in some], keys=[(i,) for i in some])
        rows = [replace(row, ids=[], loss_mask=[], logprobs=[]) for row in rows]
        mine |= zip(some, rows, strict=True)
        if kept:
            kept.parent.mkdir(exist_ok=True)
            with open(f"{kept}.{rank}", "a") as file:
                file.writelines(map(as_line, some, rows))
    done |= dict(gather_object([*mine.items()]))
    return [done[i] for i in range(len(examples))] if rank == 0 else None


def as_line(index: int, trajectory: Trajectory) -> str:
    """A line of a log of answers."""
    return json.dumps({"index": index} | asdict(trajectory)) + "\n"


def from_row(row: dict) -> Trajectory:
    """Undo `as_line`, once it is read."""
    fields = {name: value for name, value in row.items() if name != "index"}
    fields["example"] = Example(**row["example"] | {"answers": tuple(row["example"]["answers"])})
    return Trajectory(**fields | {"turns": [Turn(**turn) for turn in row["turns"]]})


def summary(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means with their standard errors over these questions (sample deviation over root n)."""
    n = len(trajectories)
    out: dict[str, float] = {"n": n}
    for name, metric in METRICS.items():
        scores = [metric(t.answer, t.example.answers) for t in trajectories]
        error = stdev(scores) / math.sqrt(n) if n > 1 else 0.0
        out |= {name: fmean(scores), f"{name}_stderr": error}
    out["searches_per_question"] = fmean(t.searches for t in trajectories)
    out["truncated"] = fmean(bool(t.truncated) for t in trajectories)
    for noisy, name in ((True, "again_after_noisy"), (False, "again_after_useful")):
        again, searches = map(sum, zip(*(searched_again(t, noisy) for t in trajectories),
                                       strict=True))  # fmt: skip
        if searches:
            out[name] = again / searches
    return out


def table(trajectories: Sequence[Trajectory]) -> dict[str, dict[str, float]]:
    """`summary` of each data set, of "overall" (all pooled), and the sets' mean, "average"."""
    sources = sorted({t.example.source for t in trajectories})
    out = {s: summary([t for t in trajectories if t.example.source == s]) for s in sources}
    average: dict[str, float] = {"n": len(trajectories)}
    for name in (*METRICS, "searches_per_question"):
        average[name] = fmean(out[s][name] for s in sources)
    for name in METRICS:  # of a mean of independent means
        average[f"{name}_stderr"] = math.hypot(*(out[s][f"{name}_stderr"] for s in sources))
        average[f"{name}_stderr"] /= len(sources)
    return out | {"overall": summary(trajectories), "average": average}


def show(tables: dict[str, dict]) -> str:
    """The tables of several policies as Markdown, in per cent, with standard errors."""
    lines = ["| | data | n | F1 | EM | contains | searches |", "|---|---|--:|--:|--:|--:|--:|"]
    for policy, table in tables.items():
        for name, row in table.items():
            cells = [policy[-24:], name, str(row["n"])]
            cells += [f"{100 * row[m]:.1f} ± {100 * row[f'{m}_stderr']:.1f}" for m in METRICS]
            lines.append(f"| {' | '.join(cells)} | {row['searches_per_question']:.2f} |")
    return "\n".join(lines)
