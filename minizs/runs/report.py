"""One self-contained page about a run: its curves, and what training did with every token.

The page (report.html, a Jinja template) loads nothing and runs no script; its filters are radio
buttons and CSS. Whatever is data is escaped; a content policy would stop what slipped by."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

import yaml
from jinja2 import Environment

from minizs import protocol
from minizs.reward import exact_match
from minizs.runs.run_folder import read_lines

PAGE = Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: visible(value) if type(value) is str else value,
).from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
PLOTS = yaml.safe_load(Path(__file__).with_name("plots.yaml").read_text(encoding="utf-8"))
FIRST, LAST, TESTS = 8, 24, 16  # trajectories shown of a log's two ends, and questions of a test


def visible(words: str) -> str:
    """Text in which what hides, moves or colours other text is a mark that can be seen."""
    return "".join(
        c if c.isprintable() or c in "\n\u200c\u200d" else " " if c.isspace() else "�"
        for c in words
    )


def write(folder: Path) -> None:
    """Write `report.html` from the logs in `folder`, whatever there is; replaced in one go."""
    rows = read_lines(folder / "trajectories.jsonl")
    shown = [*tests(folder), *([row] for row in rows[:FIRST] + rows[FIRST:][-LAST:])]
    html = render(folder.resolve().name, read_lines(folder / "metrics.jsonl"), shown)
    (temporary := folder / "report.html.tmp").write_text(html, encoding="utf-8")
    temporary.replace(folder / "report.html")  # os.replace: a reader never sees half a page


def render(name: str, metrics: list[dict], shown: list) -> str:
    """The page; `shown` are trajectories, each alone or before and after training."""
    filtered = [(kinds(*rows), rows) for rows in shown]
    counts = Counter(kind for some, _ in filtered for kind in some)
    plots = {title: plot(metrics, **form) for title, form in PLOTS.items() if metrics}
    return PAGE.render(
        name=name,
        plots=plots,
        shown=filtered,
        counts=counts,
        blocks=blocks,
        number=lambda y: f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.3g}",
    )


def plot(metrics: list[dict], series: dict[str, str], healthy: str) -> dict:
    """Where the lines of a plot run, 0 in sight, in a box of 314 by 76: those that have a value."""
    named = {
        label: [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        for name, label in series.items()
    }
    lines = {
        label: points[:: -1 - len(points) // 500][::-1]  # thinned; the last is kept
        for label, points in named.items()
        if points
    }
    values = [0.0, *(y for points in lines.values() for _, y in points)]
    first, last, low, high = metrics[0]["step"], metrics[-1]["step"], min(values), max(values)
    across, up = 314 / (last - first or 1), 76 / (high - low or 1)
    return {
        "lines": {
            label: [(across * (x - first), 96 - up * (y - low)) for x, y in points]
            for label, points in lines.items()
        },
        "now": {label: points[-1][1] for label, points in lines.items()},
        "healthy": healthy,
        "x": (first, last),
        "y": (low, high),
    }


def tests(folder: Path) -> list[tuple[dict, dict]]:
    """The first questions of the newest test, where data sets take turns, before and after."""
    log = max(
        folder.glob("evaluation*.before.jsonl"),
        key=lambda path: path.stat().st_mtime,
        default=folder / "none",
    )
    both = map(read_lines, (log, log.with_name(log.name.replace(".before.", "."))))
    pairs = [(a, b) for a, b in zip(*both, strict=False) if a["example"] == b["example"]]
    return pairs[:TESTS]


def kinds(first: dict, after: dict | None = None) -> list[str]:
    """The filters that show a trajectory, or the one after training where there are two."""
    row = after or first
    right = exact_match(row["answer"], row["example"]["answers"])
    again = any(a["noisy"] and b["action"] == "search" for a, b in pairwise(row["turns"]))
    found = {
        "all": True,
        "test": after,
        "train": not after,
        "right": right,
        "wrong": not right,
        "changed": first["answer"] != row["answer"],
        "again": again,
    }
    return [kind for kind, holds in found.items() if holds]


def blocks(row: dict) -> Iterator[tuple[str, list[tuple[float, list[str]]]]]:
    """What the policy wrote ("own") and was given ("prompt", "useful" or "noisy" documents, the
    "reply" to an invalid action, documents "unread"): runs of tokens with their advantage."""
    turns, turn, kind = iter(row["turns"]), None, "prompt"
    for own, run in groupby(tokens(row), key=lambda token: token[1]):
        alike = groupby(run, key=lambda token: token[2] or 0.0)
        yield "own" if own else kind, [(a, [piece for piece, *_ in some]) for a, some in alike]
        if own:
            turn = next(turns)
            kind = "reply" if turn["documents"] is None else "noisy" if turn["noisy"] else "useful"
    if turn and own and turn["documents"] is not None:
        yield "unread", [(0.0, [protocol.number_documents(turn["documents"])])]


def tokens(row: dict) -> Iterator[tuple[str, int, float | None]]:
    """(text, 1 if trained on, advantage) of each token; of a test, which logs none, each part."""
    if "pieces" in row:
        yield from zip(row["pieces"], row["loss_mask"], row["advantages"], strict=True)
        return
    for turn in row["turns"]:
        yield turn["text"].strip(), 1, 0.0
        if turn is not row["turns"][-1]:
            found = turn["documents"]
            reply = protocol.INVALID_ACTION if found is None else protocol.number_documents(found)
            yield reply, 0, 0.0
