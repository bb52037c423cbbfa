"""Questions in, scores out: F1, exact match and substring match, with their standard errors.

Every question counts, also one without an answer. Exact match is equality, not containment, which
the paper's code calls by that name.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev

from minizs.reward import exact_match, f1_score, substring_match
from minizs.runs.metrics import LIMITS, means, searched_again
from minizs.runs.run_folder import read_lines
from minizs.trajectory import Example, Trajectory, Turn

METRICS = {"f1": f1_score, "em": exact_match, "sub_em": substring_match}
LONGEST_NAME = 24  # characters of a policy's name in a table


# ---- Answers -------------------------------------------------------------------------------------


def answer_all(
    answer: Callable,
    examples: Sequence[Example],
    accelerator,
    batch: int = 250,
    log: Path | None = None,
) -> list[Trajectory] | None:
    """The scored trajectories of all examples, in order; None on all processes but the main one.

    `answer(examples, keys=...)` gives trajectories. A key is the example's index, so that neither
    the size of a batch nor the number of processes changes an answer. With `log`, each process
    writes what it has to the file `log.RANK`, without tokens: called again after an interruption,
    with any number of processes, this goes on where it was.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    rank = accelerator.process_index
    answered = read_log(log) if log else {}
    accelerator.wait_for_everyone()  # all have read before one writes
    open_indices = [index for index in range(len(examples)) if index not in answered]
    share = open_indices[rank :: accelerator.num_processes]
    newly_answered: dict[int, Trajectory] = {}
    for start in tqdm(range(0, len(share), batch), disable=not log or rank > 0, leave=False):
        indices = share[start : start + batch]
        trajectories = answer(
            [examples[index] for index in indices], keys=[(index,) for index in indices]
        )
        scored = dict(zip(indices, map(score_answer, trajectories), strict=True))
        newly_answered.update(scored)
        if log:
            append_to_log(Path(f"{log}.{rank}"), scored)
    answered.update(gather_object(list(newly_answered.items())))
    return [answered[index] for index in range(len(examples))] if rank == 0 else None


def score_answer(trajectory: Trajectory) -> Trajectory:
    """The trajectory with its reward and without its tokens, which a test has no use for."""
    reward = f1_score(trajectory.answer, trajectory.example.answers)
    return replace(trajectory, reward=reward, ids=[], loss_mask=[], logprobs=[])


def append_to_log(path: Path, trajectories: dict[int, Trajectory]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for index, trajectory in trajectories.items():
            file.write(to_line(index, trajectory))


def read_log(log: Path) -> dict[int, Trajectory]:
    """What all processes of earlier runs have answered, by the index of the question."""
    trajectories = {}
    for path in sorted(log.parent.glob(f"{log.name}.*")):
        for row in read_lines(path):
            index = row.pop("index")
            trajectories[index] = from_row(row)
    return trajectories


def to_line(index: int, trajectory: Trajectory) -> str:
    return json.dumps({"index": index} | asdict(trajectory)) + "\n"


def from_row(row: dict) -> Trajectory:
    """Undo `to_line`: from its line, parsed and without its index."""
    example = Example(**row["example"] | {"answers": tuple(row["example"]["answers"])})
    turns = [Turn(**turn) for turn in row["turns"]]
    return Trajectory(**row | {"example": example, "turns": turns})


# ---- Figures -------------------------------------------------------------------------------------


def summary(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means over these questions. A standard error is the sample deviation over the root of n."""
    count = len(trajectories)
    figures: dict[str, float] = {"n": count}
    for name, metric in METRICS.items():
        scores = [metric(t.answer, t.example.answers) for t in trajectories]
        figures[name] = fmean(scores)
        figures[f"{name}_stderr"] = stdev(scores) / math.sqrt(count) if count > 1 else 0.0
    figures["searches_per_question"] = fmean(t.searches for t in trajectories)
    figures["truncated"] = fmean(bool(t.truncated) for t in trajectories)
    return figures


def searches_again(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How often another search followed a noisy and a useful reply, over these questions."""
    return means(
        {
            "again_after_noisy": searched_again(trajectories, noisy=True),
            "again_after_useful": searched_again(trajectories, noisy=False),
        }
    )


def table(trajectories: Sequence[Trajectory]) -> dict[str, dict[str, float]]:
    """The `summary` of each data set, of all questions pooled ("overall"), and the data sets'
    unweighted mean ("average"), which is the figure that the paper gives. How often a policy
    searched again is told for each data set alone: pooled, it would mix questions that need
    another search with questions that do not."""
    by_source: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_source.setdefault(trajectory.example.source, []).append(trajectory)
    rows = {}
    for source in sorted(by_source):
        rows[source] = summary(by_source[source]) | searches_again(by_source[source])
    average: dict[str, float] = {"n": len(trajectories)}
    for name in (*METRICS, "searches_per_question"):
        average[name] = fmean(row[name] for row in rows.values())
    for name in (f"{metric}_stderr" for metric in METRICS):  # of a mean of independent means
        average[name] = math.hypot(*(row[name] for row in rows.values())) / len(rows)
    return rows | {"overall": summary(trajectories), "average": average}


def markdown(
    tables: dict[str, dict], noisy: dict[str, dict] | None = None, noise: float = 0.0
) -> str:
    """The tables of several policies as one in Markdown, in per cent, with standard errors.

    `noisy` has tables of the same policies and questions, but with this share of noisy replies: its
    F1 is the last column.
    """
    titles = ["", "data", "n", "F1", "EM", "contains", "searches"]
    if noisy:
        titles.append(f"F1, {noise:.0%} noisy")
    lines = [markdown_row(titles), "|---|---" + "|--:" * (len(titles) - 2) + "|"]
    for policy, rows in tables.items():
        for source, row in rows.items():
            cells = [short(policy), source, str(row["n"])]
            cells += [in_per_cent(row, metric) for metric in METRICS]
            cells.append(f"{row['searches_per_question']:.2f}")
            if noisy:
                cells.append(in_per_cent(noisy[policy][source], "f1"))
            lines.append(markdown_row(cells))
    return "\n".join(lines)


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def in_per_cent(row: dict[str, float], metric: str) -> str:
    """A score with its standard error."""
    return f"{100 * row[metric]:.1f} ± {100 * row[f'{metric}_stderr']:.1f}"


def short(name: str) -> str:
    """The end of a long name, with a sign that its beginning is missing."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


# ---- What makes figures worthless ----------------------------------------------------------------


def warnings(trajectories: Sequence[Trajectory], config) -> list[str]:
    """A sentence for each reason why these figures say little about what the policy knows.

    `config` has the limits, the method and the engine of the test.
    """
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    replies = [turn.documents for turn in turns if turn.documents is not None]
    sentences = limit_warnings(trajectories, config)
    if invalid_share(trajectories) > 0.5:
        sentences.append(
            f"{1 - invalid_share(trajectories):.0%} of the turns were a valid action, a search or "
            "an answer: look at the answers' file, and check --chat_template and the model's "
            "prompt.txt"
        )
    elif config.method == "search" and not replies:
        sentences.append(
            "not one search was carried out: the figures are about what the model knows by heart"
        )
    if replies and not any(replies) and config.engine != "none":
        sentences.append(
            f"all {len(replies):,} replies of the engine were empty: check --corpus, or the server"
        )
    return sentences


def invalid_share(trajectories: Sequence[Trajectory]) -> float:
    """The share of the turns that were neither a search nor an answer."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    return sum(turn.action == "invalid" for turn in turns) / max(1, len(turns))


def limit_warnings(trajectories: Sequence[Trajectory], config) -> list[str]:
    """A sentence about the limit that ended most trajectories, if limits ended most of them."""
    reasons = Counter(t.truncated for t in trajectories if t.truncated)
    share = reasons.total() / len(trajectories)
    if share <= 0.5:
        return []
    [(reason, _)] = reasons.most_common(1)
    if reason == "turns" and config.method != "search":
        return [f"{share:.0%} of the answers are none: the one turn of --method had no answer"]
    if reason == "turns" and invalid_share(trajectories) > 0.5:
        return []  # with more turns it would fail more often
    setting = LIMITS[reason]
    most = "all" if len(reasons) == 1 else "most"
    return [
        f"{share:.0%} of the questions have no answer since a limit was reached, {most} of them at "
        f"--{setting} {getattr(config, setting)}: raise it"
    ]
