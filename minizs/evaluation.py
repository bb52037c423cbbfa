"""Stage 3 as a function: questions in, EM, substring match and F1 with their standard errors out.

Every row counts, also one that never answered. Greedy by default (the paper's code sampled, defect
D5), and EM is equality after normalisation (the paper's code tests for a substring, D4).
"""

import math
from collections.abc import Sequence

from minizs.metrics import searched_again
from minizs.reward import exact_match, f1_score, substring_match
from minizs.rollout import rollout
from minizs.trajectory import Example, Trajectory

METRICS = {"f1": f1_score, "em": exact_match, "sub_em": substring_match}


def answer_all(model, tokenizer, examples: Sequence[Example], engine, batch: int = 250,
               progress: bool = False, keys=None, **options) -> list[Trajectory]:  # fmt: skip
    """One trajectory for each example, in order; `options` are `rollout`'s.

    A question's random numbers hang on its key (its index by default), not on the batch.
    """
    from tqdm import tqdm

    done: list[Trajectory] = []
    keys = [(i,) for i in range(len(examples))] if keys is None else keys
    starts = range(0, len(examples), batch)
    for i in tqdm(starts, disable=not progress, unit_scale=batch, unit="question", leave=False):
        part = slice(i, i + batch)
        done += rollout(model, tokenizer, examples[part], engine, keys=keys[part], **options)
    return done


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
