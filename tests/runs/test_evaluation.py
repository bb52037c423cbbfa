"""Every question is answered once, by however many processes, however often interrupted."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from scripts import on_each

from minizs.runs.evaluation import answer_all, as_line, from_row, show, summary, table
from minizs.trajectory import Example, Trajectory, Turn

EXAMPLES = [Example(f"q{i}?", (f"{i}", "x"), "ab"[i % 2]) for i in range(11)]


def trajectory(example: Example, key) -> Trajectory:
    turns = [
        Turn("<search>a</search>", "search", "a", ["one", "two"], True),
        Turn("<answer>é</answer>", "answer", "é"),
    ]
    return Trajectory(example, [1, 2], [0, 1], [0.0, -0.5], turns, f"key {key}", "", 0.25)


class Answers:
    """Answers questions, and keeps which; the batch after `stop_after` ones fails."""

    def __init__(self, stop_after=10**9):
        self.keys, self.sizes, self.stop_after = [], [], stop_after

    def __call__(self, examples, keys):
        if len(self.keys) >= self.stop_after:
            raise ConnectionError("gone")
        self.keys += keys
        self.sizes.append(len(examples))
        assert examples == [EXAMPLES[i] for (i,) in keys]
        return [trajectory(e, key) for e, key in zip(examples, keys, strict=True)]


def kept(row: Trajectory) -> Trajectory:
    """A trajectory without its tokens."""
    return replace(row, ids=[], loss_mask=[], logprobs=[])


EXPECTED = [kept(trajectory(e, (i,))) for i, e in enumerate(EXAMPLES)]
EVERY = [(i,) for i in range(len(EXAMPLES))]


def test_a_row_comes_back_from_its_line():
    """Guards an answer, a document or a gold answer that is lost on the way through a file."""
    for i, row in enumerate(EXPECTED):
        line = json.loads(as_line(i, row))
        assert line.pop("index") == i and from_row(line) == row


@pytest.mark.parametrize("processes", [1, 2, 3, 20])
@pytest.mark.parametrize("logged", [True, False])
def test_every_row_exactly_once_and_in_order(tmp_path, monkeypatch, processes, logged):
    """Guards rows that are padded, dropped or repeated, and random numbers that hang on a share."""
    answers, path = Answers(), tmp_path / "kept" / "name" if logged else None
    main, *others = on_each(
        processes, lambda a: answer_all(answers, EXAMPLES, a, 2, path), monkeypatch
    )
    assert main == EXPECTED and others == [None] * (processes - 1)
    assert sorted(answers.keys) == EVERY and max(answers.sizes) <= 2
    assert (tmp_path / "kept").exists() == logged
    if logged:
        again = Answers(stop_after=0)  # it has nothing to ask
        call = lambda a: answer_all(again, EXAMPLES, a, 2, path)  # noqa: E731
        assert on_each(2, call, monkeypatch)[0] == EXPECTED


@pytest.mark.parametrize("first, then", [(1, 1), (2, 3), (3, 1)])
def test_it_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, first, then):
    """Guards an engine that is paid twice, a half-written line, and answers that got lost."""
    folder = tmp_path / "out[1]"  # not a pattern

    def run(processes, answers, name="name"):
        call = lambda a: answer_all(answers, EXAMPLES, a, 2, folder / name)  # noqa: E731
        return on_each(processes, call, monkeypatch)[0]

    before = Answers(stop_after=5)
    with pytest.raises(ConnectionError):
        run(first, before)
    assert 5 <= len(before.keys) < 11
    sorted(folder.iterdir())[0].open("a").write('{"index": 9, "exa')  # killed while it wrote
    there = {path: path.read_text() for path in folder.iterdir()}
    another = Answers()
    run(1, another, "another")  # of other settings
    assert sorted(another.keys) == EVERY
    assert {path: path.read_text() for path in there} == there
    after = Answers()
    assert run(then, after) == EXPECTED
    assert Counter(before.keys + after.keys) == Counter(EVERY)


def test_interrupted_again_and_again(tmp_path, monkeypatch):
    """Guards a second interruption that loses what was there after the first."""
    asked, path = [], tmp_path / "kept"

    def run(answers):
        call = lambda a: answer_all(answers, EXAMPLES, a, 2, path)  # noqa: E731
        try:
            return on_each(1, call, monkeypatch)
        finally:
            asked.extend(answers.keys)

    for _ in range(2):
        with pytest.raises(ConnectionError):
            run(Answers(stop_after=4))
    assert run(Answers()) == [EXPECTED] and asked == EVERY


def test_figures_by_hand():
    """Guards unanswered questions that do not count, and searches that were not executed."""
    example = Example("q?", ("red house",))
    rows = [Trajectory(example, answer=answer) for answer in ("red", "a red house", None)]
    rows[0].turns = [Turn("", "search", "q", ["d"], True), Turn("", "answer", "red")]
    rows[1].turns = [
        Turn("", "search", "q", ["d"]),
        Turn("", "search", "q", []),
        Turn("", "answer", "red house"),
    ]
    rows[2].truncated = "turns"
    out = summary(rows)
    assert out["n"] == 3 and out["em"] == pytest.approx(1 / 3)
    assert out["f1"] == pytest.approx((2 / 3 + 1) / 3)
    assert out["searches_per_question"] == 1 and out["truncated"] == pytest.approx(1 / 3)
    assert out["again_after_noisy"] == 0 and out["again_after_useful"] == 0.5


def test_markdown():
    """Guards a table that no Markdown reader shows, and a policy or a data set left out."""
    tables = {"before": table(EXPECTED), "runs/policy-1/policy": table(EXPECTED[:4])}
    lines = show(tables).splitlines()
    assert len(lines) == 2 + 2 * 4 and all(line.count("|") == 8 for line in lines)
    assert set(lines[1]) == set("|-:")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[:3] for row in cells[:4]] == [
        ["before", "a", "6"],
        ["before", "b", "5"],
        ["before", "overall", "11"],
        ["before", "average", "11"],
    ]
    assert cells[4][0] == "runs/policy-1/policy" and cells[6][2] == "4"
    assert all(" ± " in cell for row in cells for cell in row[3:6])
    assert cells[2][6] == "1.00"
