"""Stage 3 as a function: questions in, EM, substring match and F1 with their standard errors out.

Every row counts, also one that never answered. Greedy by default (the paper's code sampled, defect
D5), and EM is equality after normalisation (the paper's code tests for a substring, D4).
"""

import glob
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from minizs.metrics import searched_again
from minizs.reward import exact_match, f1_score, substring_match
from minizs.runs import read_lines
from minizs.trajectory import Example, Trajectory, Turn

METRICS = {"f1": f1_score, "em": exact_match, "sub_em": substring_match}
Answer = Callable[..., list[Trajectory]]  # (examples, keys=...) -> one trajectory each


def answer_all(answer: Answer, examples: Sequence[Example], accelerator, batch: int = 250,
               log: Path | None = None, name: str = "") -> list[Trajectory] | None:  # fmt: skip
    """One trajectory for each example, in order, over all processes: None but on the main one.

    Every example is answered exactly once, with its index as its key, so that neither batch nor
    processes change an answer. With `log` each batch is appended to a file `log.NAME.RANK` when it
    is done: called again after an interruption, with any number of processes, it goes on from
    there. In the end the main process writes `log`, an answer a line; those files (`parts`) are
    the caller's to remove. Of a trajectory the text is kept, not the tokens.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    rank, world = accelerator.process_index, accelerator.num_processes
    before = parts(log, name) if log else []
    done = {row["index"]: row for part in before for row in read_lines(part)}
    accelerator.wait_for_everyone()  # all have read before one writes
    todo = [i for i in range(len(examples)) if i not in done][rank::world]
    mine = []
    bar = tqdm(total=len(todo), disable=not name or rank > 0, unit="question", leave=False)
    for start in range(0, len(todo), batch):
        some = todo[start : start + batch]
        rows = answer([examples[i] for i in some], keys=[(i,) for i in some])
        rows = [{"index": i} | as_row(row) for i, row in zip(some, rows, strict=True)]
        mine += rows
        if log:
            with open(f"{log}.{name}.{rank}", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        bar.update(len(some))
    done |= {row["index"]: row for row in gather_object(mine)}
    if rank > 0:
        return None
    rows = [done[i] for i in range(len(examples))]
    if log:
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [from_row(row) for row in rows]


def parts(log: Path, name: str) -> list[Path]:
    """The files in which `answer_all` keeps what is done."""
    return sorted(log.parent.glob(f"{glob.escape(log.name)}.{name}.*"))


def as_row(trajectory: Trajectory) -> dict:
    """What a log keeps of a trajectory: all but its tokens."""
    tokens = ("ids", "loss_mask", "logprobs")
    return {name: value for name, value in asdict(trajectory).items() if name not in tokens}


def from_row(row: dict) -> Trajectory:
    """Undo `as_row`."""
    example = Example(**row["example"] | {"answers": tuple(row["example"]["answers"])})
    turns = [Turn(**turn) for turn in row["turns"]]
    return Trajectory(example, turns=turns, answer=row["answer"], truncated=row["truncated"],
                      reward=row["reward"])  # fmt: skip


def summary(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means with their standard errors over these questions (sample deviation over root n)."""
    n = len(trajectories)
    out: dict[str, float] = {"n": n}
    for name, metric in METRICS.items():
        scores = [metric(t.answer, t.example.answers) for t in trajectories]
        mean = sum(scores) / n
        spread = math.sqrt(sum((x - mean) ** 2 for x in scores) / max(1, n - 1))
        out |= {name: mean, f"{name}_stderr": spread / math.sqrt(n)}
    out["searches_per_question"] = sum(t.searches for t in trajectories) / n
    out["truncated"] = sum(bool(t.truncated) for t in trajectories) / n
    for noisy, name in ((True, "again_after_noisy"), (False, "again_after_useful")):
        pairs = [searched_again(t, noisy) for t in trajectories]
        again, searches = (sum(column) for column in zip(*pairs, strict=True))
        if searches:
            out[name] = again / searches
    return out


def table(trajectories: Sequence[Trajectory]) -> dict[str, dict[str, float]]:
    """`summary` of each data set, of "overall" (all pooled), and the sets' mean, "average"."""
    sources = sorted({t.example.source for t in trajectories})
    out = {s: summary([t for t in trajectories if t.example.source == s]) for s in sources}
    average: dict[str, float] = {"n": len(trajectories)}
    for name in (*METRICS, "searches_per_question"):
        average[name] = sum(out[s][name] for s in sources) / len(sources)
    for name in METRICS:  # of a mean of independent means
        errors = [out[s][f"{name}_stderr"] for s in sources]
        average[f"{name}_stderr"] = math.sqrt(sum(e * e for e in errors)) / len(sources)
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
