"""Every question is answered and scored once, by however many processes, however often interrupted;
the figures, and the sentences about figures that mean little."""

import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from scripts import on_each

from minizs.evaluation.scores import (
    answer_all,
    from_row,
    markdown,
    score_answer,
    summary,
    table,
    to_line,
    warnings,
)
from minizs.runs.metrics import again_counts, means
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
        self.keys = []
        self.sizes = []
        self.stop_after = stop_after

    def __call__(self, examples, keys):
        if len(self.keys) >= self.stop_after:
            raise ConnectionError("gone")
        self.keys += keys
        self.sizes.append(len(examples))
        assert examples == [EXAMPLES[i] for (i,) in keys]
        return [trajectory(e, key) for e, key in zip(examples, keys, strict=True)]


EXPECTED = [score_answer(trajectory(e, (i,))) for i, e in enumerate(EXAMPLES)]
EVERY = [(i,) for i in range(len(EXAMPLES))]


def test_a_score_is_f1_and_tokens_are_dropped():
    """The reward of a test is F1 with the best gold; its trajectories hold text, not tokens."""
    row = score_answer(replace(trajectory(EXAMPLES[3], (3,)), answer="the x y"))
    assert row.reward == pytest.approx(2 / 3)
    assert (row.ids, row.loss_mask, row.logprobs) == ([], [], [])
    assert row.turns == trajectory(EXAMPLES[3], (3,)).turns


def test_a_row_comes_back_from_its_line():
    """Nothing of a trajectory is lost on the way through a file."""
    for i, row in enumerate(EXPECTED):
        line = json.loads(to_line(i, row))
        assert line.pop("index") == i and from_row(line) == row


@pytest.mark.parametrize("processes", [1, 2, 3, 20])
@pytest.mark.parametrize("logged", [True, False])
def test_every_row_exactly_once_and_in_order(tmp_path, monkeypatch, processes, logged):
    """The main process has all rows, in order; the key of a question is its index, whoever asks."""
    answers = Answers()
    path = tmp_path / "kept" / "name" if logged else None
    main, *others = on_each(
        processes, lambda a: answer_all(answers, EXAMPLES, a, 2, path), monkeypatch
    )
    assert main == EXPECTED and others == [None] * (processes - 1)
    assert sorted(answers.keys) == EVERY and max(answers.sizes) <= 2
    assert (tmp_path / "kept").exists() == logged
    if logged:
        unused = Answers(stop_after=0)  # it has nothing to ask
        call = lambda a: answer_all(unused, EXAMPLES, a, 2, path)  # noqa: E731
        assert on_each(2, call, monkeypatch)[0] == EXPECTED


@pytest.mark.parametrize("first, then", [(1, 1), (2, 3), (3, 1)])
def test_it_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, first, then):
    """Nothing is asked twice, a half-written line is passed over, and another log is left alone."""
    folder = tmp_path / "out[1]"  # not a pattern

    def run(processes, answers, name="name"):
        call = lambda a: answer_all(answers, EXAMPLES, a, 2, folder / name)  # noqa: E731
        return on_each(processes, call, monkeypatch)[0]

    before = Answers(stop_after=5)
    with pytest.raises(ConnectionError):
        run(first, before)
    assert 5 <= len(before.keys) < 11
    sorted(folder.iterdir())[0].open("a").write('{"index": 9, "exa')  # killed while it wrote
    texts = {path: path.read_text() for path in folder.iterdir()}
    another = Answers()
    run(1, another, "another")  # of other settings
    assert sorted(another.keys) == EVERY
    assert {path: path.read_text() for path in texts} == texts
    after = Answers()
    assert run(then, after) == EXPECTED
    assert Counter(before.keys + after.keys) == Counter(EVERY)


def test_interrupted_again_and_again(tmp_path, monkeypatch):
    """A second interruption loses nothing of what was there after the first."""
    keys = []
    path = tmp_path / "kept"

    def run(answers):
        call = lambda a: answer_all(answers, EXAMPLES, a, 2, path)  # noqa: E731
        try:
            return on_each(1, call, monkeypatch)
        finally:
            keys.extend(answers.keys)

    for _ in range(2):
        with pytest.raises(ConnectionError):
            run(Answers(stop_after=4))
    assert run(Answers()) == [EXPECTED] and keys == EVERY


def test_figures_by_hand():
    """A question without an answer counts 0, and so does a search that was not carried out."""
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
    rows_by_source = table(rows)
    assert rows_by_source["data"] == out | {"again_after_noisy": 0, "again_after_useful": 0.5}
    assert rows_by_source["overall"] == out


def test_searching_again_counts_where_one_look_up_is_enough():
    """Of the tiny world's questions those with one look-up count, and of other data all do, under
    another name. What did not occur is left out."""
    turns = [Turn("", "search", "q", ["d"], True), Turn("", "search", "q", ["d"])]
    turns.append(Turn("", "answer", "x"))
    again = {}
    for source in ("one_hop", "two_hop", "nq"):
        row = Trajectory(Example("q?", ("x",), source), turns=turns)
        again[source] = means(again_counts([row, replace(row, turns=turns[1:])]))
    assert again["one_hop"] == {"one_hop_again_after_noisy": 1, "one_hop_again_after_useful": 0}
    assert again["two_hop"] == {}
    assert again["nq"] == {"again_after_noisy": 1, "again_after_useful": 0}


def test_markdown_with_a_noisy_test():
    """The F1 of the second test is the last column, in the row of the same questions."""
    clean = {"mine": table(EXPECTED)}
    noisy = {"mine": table([replace(row, answer=None) for row in EXPECTED])}
    assert clean["mine"]["overall"]["f1"] > 0
    plain = markdown(clean).splitlines()
    lines = markdown(clean, noisy, 0.25).splitlines()
    assert lines[0] == f"{plain[0]} F1, 25% noisy |" and lines[1] == f"{plain[1]}--:|"
    assert lines[2:] == [f"{line} 0.0 ± 0.0 |" for line in plain[2:]]


def test_markdown():
    """A row for each policy and data set. A long name is cut on the left, with a sign."""
    name = "somewhere/runs/policy-1/policy"
    tables = {"before": table(EXPECTED), name: table(EXPECTED[:4])}
    lines = markdown(tables).splitlines()
    assert len(lines) == 2 + 2 * 4 and all(line.count("|") == 8 for line in lines)
    assert set(lines[1]) == set("|-:")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[:3] for row in cells[:4]] == [
        ["before", "a", "6"],
        ["before", "b", "5"],
        ["before", "overall", "11"],
        ["before", "average", "11"],
    ]
    assert cells[4][0].startswith("…") and name.endswith(cells[4][0][1:]) and cells[6][2] == "4"
    assert all(" ± " in cell for row in cells for cell in row[3:6])
    assert cells[2][6] == "1.00"


SETTINGS = SimpleNamespace(
    method="search", engine="bm25", max_turns=3, max_turn_tokens=40, max_context=448
)


def ended(*reasons: str) -> list[Trajectory]:
    """Trajectories that searched once and then ended for these reasons, "" being an answer."""
    rows = [score_answer(trajectory(EXAMPLES[0], (0,))) for _ in reasons]
    return [replace(row, truncated=reason) for row, reason in zip(rows, reasons, strict=True)]


def test_sound_figures_have_no_warning():
    """Where at most half of the answers ended at a limit there is nothing to say."""
    assert warnings(ended("", "turns"), SETTINGS) == []


@pytest.mark.parametrize(
    "reasons, sentence",
    [
        (("turns", "turns", ""), "67% of the questions .* all of them at --max_turns 3: raise it"),
        (("turn_tokens",) * 3 + ("turns",), "100% .* most of them at --max_turn_tokens 40: raise"),
        (("context",), "100% .* --max_context 448: raise it"),
    ],
)
def test_most_answers_ended_at_a_limit(reasons, sentence):
    """The share, the limit and its value, and what to do."""
    [warning] = warnings(ended(*reasons), SETTINGS)
    assert re.match(sentence, warning)


def test_no_valid_action_no_search_and_empty_replies():
    """Each of them is one sentence for all questions together."""
    example = EXAMPLES[0]
    invalid = Trajectory(example, turns=[Turn("hm", "invalid", "")])
    silent = Trajectory(example, turns=[Turn("<answer>x</answer>", "answer", "x")], answer="x")
    empty = Trajectory(example, turns=[Turn("", "search", "q", []), *silent.turns], answer="x")
    [warning] = warnings([invalid, invalid], SETTINGS)
    assert "0% of the turns were a valid action" in warning
    lost = Trajectory(example, turns=invalid.turns * 3, truncated="turns")
    [warning] = warnings([lost, lost, silent], SETTINGS)  # not: raise --max_turns
    assert "14% of the turns were a valid action" in warning
    [warning] = warnings([invalid, silent], SETTINGS)
    assert "not one search was carried out" in warning
    [warning] = warnings([silent, empty], SETTINGS)
    assert "all 1 replies of the engine were empty" in warning
    assert warnings([silent, empty], replace_setting(engine="none")) == []
    assert warnings([silent], replace_setting(method="direct")) == []
    [warning] = warnings(ended("turns"), replace_setting(method="cot"))
    assert "raise" not in warning  # a second turn is not to be had


def replace_setting(**changes) -> SimpleNamespace:
    return SimpleNamespace(**vars(SETTINGS) | changes)
