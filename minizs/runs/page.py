"""One self-contained page about a run: its curves, and what training did with every token.

The page (page.html, a Jinja template) loads nothing and runs no script: its filters are radio
buttons and CSS. Whatever is data is escaped, and a content policy would stop what slipped by.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, product
from pathlib import Path

import yaml
from jinja2 import Environment

from minizs import protocol
from minizs.reward import exact_match
from minizs.runs.near_misses import BELIEVED, DOUBTED, near_misses
from minizs.runs.run_folder import read_lines
from minizs.runs.terminal import visible

HERE = Path(__file__).parent
PLOTS = yaml.safe_load((HERE / "plots.yaml").read_text(encoding="utf-8"))
FIRST, LAST = 8, 24  # how many trajectories of the log's beginning and end are on the page
TESTS = 16  # how many questions of a test
POINTS = 500  # of a curve, at most
WIDTH, HEIGHT, BOTTOM = 314, 76, 96  # of a plot's box, and where its lower edge is

# The filters, by what stands for no choice in their group. One can be chosen in each group, and a
# trajectory has to fit all that are.
FILTERS = {
    "all": {
        "test": "before and after",
        "noisy_test": "before and after, noisy engine",
        "train": "while training",
    },
    "any answer": {"right": "right", "wrong": "wrong"},
    "any reading": {BELIEVED: "believed a near miss", DOUBTED: "doubted a near miss"},
    "any change": {"changed": "changed its mind"},
}

# What stands beside the documents of a near miss (see near_misses.py).
OUTCOMES = {
    BELIEVED: "a near miss, believed",
    DOUBTED: "a near miss, doubted",
    "": "a near miss",
}

PAGE = Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: visible(value) if type(value) is str else value,
).from_string((HERE / "page.html").read_text(encoding="utf-8"))


def write_page(folder: Path) -> None:
    """Write `report.html` from the logs in `folder`, whatever there is.

    It is replaced in one step, so that a reader never sees half a page. A training and a test can
    write it at the same time: each has a temporary file of its own.
    """
    html = render_page(
        name=folder.resolve().name,
        metrics=read_lines(folder / "metrics.jsonl"),
        groups={
            "test": test_pairs(folder),
            "noisy_test": test_pairs(folder, noisy=True),
            "train": training_samples(folder),
        },
        settings=settings_text(folder / "config.yaml"),
    )
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=folder, suffix=".tmp", delete=False
    ) as file:
        file.write(html)
    page = Path(file.name)
    page.chmod(0o644)  # a temporary file is its owner's alone
    page.replace(folder / "report.html")


def settings_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def render_page(
    name: str, metrics: list[dict], groups: dict[str, list[tuple]], settings: str = ""
) -> str:
    """The page. `groups` has the trajectories by where they come from, a choice of the first of the
    `FILTERS`: each is a row of a log alone, or two, before and after training."""
    trajectories = []
    for source, group in groups.items():
        trajectories += [([source, *labels(*rows)], rows) for rows in group]
    counts = Counter(label for row_labels, _ in trajectories for label in row_labels)
    empty_choices = [
        choice
        for choice in filter_choices()
        if not any(set(choice) <= set(row_labels) for row_labels, _ in trajectories)
    ]
    plots = {}
    if metrics:
        plots = {title: plot(metrics, **form) for title, form in PLOTS.items()}
    return PAGE.render(
        name=name,
        plots=plots,
        settings=settings,
        filters=FILTERS,
        empty_choices=empty_choices,
        counts=counts,
        trajectories=trajectories,
        blocks=blocks,
        number=number,
    )


def filter_choices() -> list[list[str]]:
    """Every choice of at most one filter of each group."""
    groups = [[None, *filters] for filters in FILTERS.values()]
    return [[label for label in choice if label] for choice in product(*groups)]


def number(value: float) -> str:
    """A figure as a reader wants it: three digits, or whole thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# ---- Curves --------------------------------------------------------------------------------------


def plot(metrics: list[dict], series: dict[str, str], healthy: str) -> dict:
    """A plot's lines in pixels, for those of the `series` that have values, with 0 in sight."""
    lines = {}
    for name, label in series.items():
        points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        if points:
            lines[label] = thinned(points)
    values = [0.0] + [value for points in lines.values() for _, value in points]
    first = metrics[0]["step"]
    last = metrics[-1]["step"]
    low = min(values)
    high = max(values)
    across = WIDTH / (last - first or 1)
    up = HEIGHT / (high - low or 1)
    return {
        "lines": {
            label: [
                (across * (step - first), BOTTOM - up * (value - low)) for step, value in points
            ]
            for label, points in lines.items()
        },
        "now": {label: points[-1][1] for label, points in lines.items()},
        "healthy": healthy,
        "x": (first, last),
        "y": (low, high),
    }


def thinned(points: list) -> list:
    """At most `POINTS` of them, evenly, the last one among them."""
    stride = 1 + len(points) // POINTS
    return points[::-1][::stride][::-1]


# ---- Trajectories --------------------------------------------------------------------------------


def training_samples(folder: Path) -> list[tuple[dict]]:
    """Trajectories from both ends of the training's log."""
    rows = read_lines(folder / "trajectories.jsonl")
    return [(row,) for row in rows[:FIRST] + rows[FIRST:][-LAST:]]


def test_pairs(folder: Path, noisy: bool = False) -> list[tuple[dict, dict]]:
    """The first questions of the newest test, before and after training, or of the newest one with
    noisy replies. Its log takes the data sets in turn, so that these are of all of them."""
    pattern = "evaluation*.before.noisy.jsonl" if noisy else "evaluation*.before.jsonl"
    logs = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not logs:
        return []
    before = read_lines(logs[-1])
    after = read_lines(logs[-1].with_name(logs[-1].name.replace(".before.", ".")))
    # A test that was interrupted has fewer answers of one of the two.
    pairs = [
        pair
        for pair in zip(before, after, strict=False)
        if pair[0]["example"] == pair[1]["example"]
    ]
    return pairs[:TESTS]


def labels(first: dict, after: dict | None = None) -> list[str]:
    """The other filters that a trajectory fits, or the one after training where there are two."""
    row = after or first
    is_right = exact_match(row["answer"], row["example"]["answers"])
    fitting = ["right" if is_right else "wrong"]
    outcomes = set(near_misses(row).values())
    fitting += sorted(outcomes - {""})
    if first["answer"] != row["answer"]:
        fitting.append("changed")
    return fitting


def blocks(row: dict) -> Iterator[tuple[str, str, list[tuple[float, list[str]]]]]:
    """A trajectory as blocks of text in their order: (kind, note, [(advantage, pieces), ...]).

    The kind is "own" for what the policy wrote, and else tells what it was given: the "prompt",
    "useful" or "noisy" documents, the "reply" to an invalid action, or documents that it has not
    read ("unread"). The note says what became of a near miss, and is "" elsewhere.
    """
    outcomes = near_misses(row)
    turns = enumerate(row["turns"])
    turn = None
    kind = "prompt"
    note = ""
    for own, block in groupby(tokens(row), key=lambda token: token[1]):
        runs = []
        for advantage, run in groupby(block, key=lambda token: token[2] or 0.0):
            runs.append((advantage, [piece for piece, *_ in run if piece]))
        yield "own" if own else kind, "" if own else note, runs
        if own:
            number, turn = next(turns)
            kind = reply_kind(turn)
            note = OUTCOMES.get(outcomes.get(number), "")
    if turn and own and turn["documents"] is not None:
        yield "unread", "", [(0.0, [protocol.number_documents(turn["documents"])])]


def reply_kind(turn: dict) -> str:
    """What a turn was answered with."""
    if turn["documents"] is None:
        return "reply"
    return "noisy" if turn["noisy"] else "useful"


def tokens(row: dict) -> Iterator[tuple[str, int, float | None]]:
    """(text, 1 if trained on, advantage) of each token, or of each turn where none is logged."""
    if "pieces" in row:
        yield from zip(row["pieces"], row["loss_mask"], row["advantages"], strict=True)
        return
    for number, turn in enumerate(row["turns"], 1):
        yield turn["text"].strip(), 1, 0.0
        if number < len(row["turns"]):
            reply = protocol.INVALID_ACTION
            if turn["documents"] is not None:
                reply = protocol.number_documents(turn["documents"])
            yield reply, 0, 0.0
