"""Questions from files, and which of them a step trains on."""

import json
from collections import Counter

import pytest

from minizs import data
from minizs.config import UserError
from minizs.trajectory import Example

ROWS = [
    {"question": "q1?", "golden_answers": ["a", "b"], "data_source": "nq"},
    {"question": "q2?", "golden_answers": ["c"], "data_source": "hotpot"},
]
EXPECTED = [Example("q1?", ("a", "b"), "nq"), Example("q2?", ("c",), "hotpot")]


def write(path, rows):
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The library keeps a copy of what it reads: not in the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_every_format_gives_the_same_examples(tmp_path, name):
    """Guards gold answers that are lost but for the first, and sources that are mixed up."""
    assert data.load(write(tmp_path / name, ROWS), "test") == EXPECTED


def test_odd_rows(tmp_path):
    """Guards a plain answer read letter by letter, and rows that could never score."""
    rows = [
        {"question": "q1?", "answer": "abc"},
        {"question": "q2?", "answer": " "},
        {"question": "", "answer": "x"},
        {"question": "q4?", "answer": None},
    ]
    path = write(tmp_path / "mine.jsonl", rows)
    assert data.load(path, "test") == [Example("q1?", ("abc",), "mine")]
    with pytest.raises(UserError, match="no row"):
        data.load(write(tmp_path / "none.jsonl", rows[1:]), "train")


@pytest.mark.parametrize(
    "row, missing",
    [({"query": "q", "answer": "a"}, "question"), ({"question": "q", "gold": "a"}, "answers")],
)
def test_a_missing_column_is_named_with_those_found(tmp_path, row, missing):
    """Guards a KeyError in the user's face."""
    with pytest.raises(UserError, match=f"no column .*'{missing}'") as error:
        data.load(write(tmp_path / "a.jsonl", [row]), "train")
    assert all(repr(name) in str(error.value) for name in row)


def test_wrong_files(tmp_path):
    """Guards wrong paths and formats that are noticed only after minutes of work."""
    for spec, words in ((tmp_path / "no.jsonl", "check the path"), ("some/dataset", "neither")):
        for function in (data.check, lambda spec: data.load(spec, "train")):
            with pytest.raises(UserError, match=words):
                function(str(spec))
    (tmp_path / "bad.jsonl").write_text("no json")
    with pytest.raises(UserError, match="cannot be read as json: .*(?i:invalid|malformed|parse)"):
        data.load(str(tmp_path / "bad.jsonl"), "train")


def test_a_file_is_split_by_its_questions(tmp_path):
    """Guards held-out questions that are trained on, or change with a row's place in the file."""
    rows = [{"question": f"q{i}?", "answer": "a"} for i in range(200)]
    path, back = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])
    train, dev, test = (data.load(path, role) for role in ("train", "dev", "test"))
    assert len(test) == 200 and sorted(train + dev, key=test.index) == test
    assert 8 <= len(dev) <= 35
    assert {e.question for e in data.load(back, "dev")} == {e.question for e in dev}


def test_the_world_is_the_default():
    """Guards roles that share a world: what is trained on must not be tested."""
    data.check("world")
    train, test = (data.load("world", role) for role in ("train", "test"))
    assert {e.source for e in train} == {e.source for e in test} == {"one_hop", "two_hop"}
    assert len({*train} & {*test}) < 0.01 * len(test)


def test_batches_see_every_question_once_an_epoch():
    """Guards questions that are drawn anew each step, or lost at an epoch's end."""
    seen = [i for step in range(1, 8) for i in data.batch(range(10), step, 4, seed=3)]
    assert len(seen) == 28
    for epoch in range(2):
        assert Counter(seen[10 * epoch : 10 * epoch + 10]) == Counter(range(10))
    assert seen[:10] != seen[10:20]  # a new order
    assert max(Counter(data.batch(range(3), 1, 7, 0)).values()) == 3  # more than there are


def test_a_step_is_a_function_of_the_seed():
    """Guards a resumed run that repeats or skips questions: there is no cursor."""
    first = data.batch(range(100), 9, 16, seed=1)
    assert first == data.batch(list("x" * 100), 9, 16, seed=1)
    assert first != data.batch(range(100), 9, 16, seed=2)
    assert first != data.batch(range(100), 10, 16, seed=1)
