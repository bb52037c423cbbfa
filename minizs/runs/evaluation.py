"""Stage 3 as functions: questions in, EM, substring match and F1 with their standard errors out.

Every row counts, also one without an answer; EM is equality, not containment (defect D4)."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev

from minizs.protocol import build_prompt, neutralize, number_documents, reply_ids
from minizs.reward import exact_match, f1_score, substring_match
from minizs.rollout import Limits, Policy, rollout
from minizs.runs.metrics import searched_again
from minizs.runs.run_folder import read_lines
from minizs.trajectory import Example, SearchRequest, Trajectory, Turn

METRICS = {"f1": f1_score, "em": exact_match, "sub_em": substring_match}


def baseline(
    method: str,
    policy: Policy,
    examples: Sequence[Example],
    engine,
    *,
    keys: Sequence[tuple[int, ...]] | None = None,
    on_turn: Callable[[Turn], None] = lambda turn: None,
) -> list[Trajectory]:
    """Paper section 4.2, a turn for each example: "direct", "cot" (chain of thought), or "rag", on
    what one search for the question finds. The wording is in `prompts/`."""
    tokenizer, limits = policy.tokenizer, policy.limits
    wording = (Path(__file__).parent.parent / "prompts" / f"{method}.txt").read_text(
        encoding="utf-8"
    )
    found: list[list[str] | None] = [None for _ in examples]
    if method == "rag":
        asked = [neutralize(example.question, tokenizer) for example in examples]
        requests = [SearchRequest(q, q, e.answers) for q, e in zip(asked, examples, strict=True)]
        found = [[neutralize(text, tokenizer) for text in some] for some in engine.search(requests)]
    texts = [number_documents(some or []) for some in found]
    cut = [
        tokenizer.decode(ids[: limits.document_tokens])
        if len(ids) > limits.document_tokens
        else text
        for ids, text in zip(reply_ids(tokenizer, texts), texts, strict=True)
    ]
    shown = [wording.replace("{documents}", text) for text in cut]
    prompts = [build_prompt(e.question, w, tokenizer) for e, w in zip(examples, shown, strict=True)]
    one_turn = Limits(turns=1, turn_tokens=limits.turn_tokens, context=math.inf)
    policy = replace(policy, limits=one_turn)
    rows = rollout(policy, examples, engine, keys=keys, prompts=prompts, on_turn=on_turn)
    for row, documents in zip(rows, found, strict=True):
        row.turns[0].documents = documents
        if method == "rag":
            on_turn(row.turns[0])
    return rows


def answer_all(
    answer: Callable,
    examples: Sequence[Example],
    accelerator,
    batch: int = 250,
    kept: Path | None = None,
) -> list[Trajectory] | None:
    """`answer(examples, keys=...)` for all, in order, over all processes: None but on the main one.
    A key is an index: neither batch nor processes change an answer. With `kept`, what is done lies
    in files `kept.RANK`, tokens left out: called again after an interruption, it goes on there."""
    from accelerate.utils import gather_object
    from tqdm import tqdm

    rank, world, mine = accelerator.process_index, accelerator.num_processes, {}
    files = kept.parent.glob(f"{kept.name}.*") if kept else []
    done = {row.pop("index"): from_row(row) for file in files for row in read_lines(file)}
    accelerator.wait_for_everyone()  # all have read before one writes
    todo = [i for i in range(len(examples)) if i not in done][rank::world]
    for start in tqdm(range(0, len(todo), batch), disable=not kept or rank > 0, leave=False):
        some = todo[start : start + batch]
        rows = answer([examples[i] for i in some], keys=[(i,) for i in some])
        for row in rows:
            row.reward = f1_score(row.answer, row.example.answers)
        rows = [replace(row, ids=[], loss_mask=[], logprobs=[]) for row in rows]
        mine |= zip(some, rows, strict=True)
        if kept:
            kept.parent.mkdir(exist_ok=True)
            with open(f"{kept}.{rank}", "a", encoding="utf-8") as file:
                file.writelines(map(as_line, some, rows))
    done |= dict(gather_object([*mine.items()]))
    return [done[i] for i in range(len(examples))] if rank == 0 else None


def as_line(index: int, trajectory: Trajectory) -> str:
    return json.dumps({"index": index} | asdict(trajectory)) + "\n"


def from_row(row: dict) -> Trajectory:
    """Undo `as_line`, read and without its index."""
    example = row["example"] | {"answers": tuple(row["example"]["answers"])}
    turns = [Turn(**turn) for turn in row["turns"]]
    return Trajectory(**row | {"example": Example(**example), "turns": turns})


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
    again = {label: searched_again(trajectories, label == "noisy") for label in ("noisy", "useful")}
    return out | {f"again_after_{label}": a / n for label, (a, n) in again.items() if n}


def table(trajectories: Sequence[Trajectory]) -> dict[str, dict[str, float]]:
    """`summary` of each data set, of "overall" (all pooled), and the sets' mean, "average"."""
    sources = sorted({t.example.source for t in trajectories})
    out = {s: summary([t for t in trajectories if t.example.source == s]) for s in sources}
    average = {m: fmean(out[s][m] for s in sources) for m in (*METRICS, "searches_per_question")}
    for name in (f"{metric}_stderr" for metric in METRICS):  # of a mean of independent means
        average[name] = math.hypot(*(out[s][name] for s in sources)) / len(sources)
    return out | {"overall": summary(trajectories), "average": {"n": len(trajectories)} | average}


def show(tables: dict[str, dict]) -> str:
    """The tables of several policies as Markdown, in per cent, with standard errors."""
    lines = ["| | data | n | F1 | EM | contains | searches |", "|---|---|--:|--:|--:|--:|--:|"]
    for policy, table in tables.items():
        for name, row in table.items():
            cells = [policy[-24:], name, str(row["n"])]
            cells += [f"{100 * row[m]:.1f} ± {100 * row[f'{m}_stderr']:.1f}" for m in METRICS]
            lines.append(f"| {' | '.join(cells)} | {row['searches_per_question']:.2f} |")
    return "\n".join(lines)
