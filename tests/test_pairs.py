"""What a simulator is trained on: three layouts of a row, and what is none."""

import json

import pytest
from conftest import make_tokenizer

from minizs import data, sft
from minizs.config import UserError
from minizs.pairs import pairs

OURS = {"query": "q", "question": "who?", "answers": ["x", "y"], "documents": ["one", "two"],
        "label": "useful"}  # fmt: skip
TEMPLATE = "{query} {question} {answers} {top_k} {quality}"
USER, REPLY = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "Doc 1: a"}
SYSTEM = {"role": "system", "content": "be Google"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The library keeps a copy of what it reads: not in the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_our_rows_are_asked_with_the_template(tmp_path):
    """Guards a simulator that is trained on other words than it is asked with."""
    noisy = OURS | {"label": "noisy", "documents": ["three"]}
    said = []
    texts = pairs(write(tmp_path / "a.jsonl", [noisy, OURS]), TEMPLATE, say=said.append)
    assert texts == [
        [("q who? x or y 1 noisy", False), ("Doc 1: three", True)],
        [("q who? x or y 2 useful", False), ("Doc 1: one\nDoc 2: two", True)],
    ]
    assert len(said) == 1 and "2 of 2 pairs" in said[0]


def test_our_rows_are_balanced(tmp_path):
    """Guards a simulator that learns one word only, and a choice by place in the file."""
    rows = [OURS | {"query": f"q{i}", "label": "noisy" if i % 5 else "useful"} for i in range(40)]
    path, said = write(tmp_path / "a.jsonl", rows), []
    texts = pairs(path, TEMPLATE, seed=1, say=said.append)
    asked = [prompt.split() for [(prompt, _), _] in texts]
    assert [words[-1] for words in asked].count("useful") == 8 and len(asked) == 16
    order = [int(words[0][1:]) for words in asked]
    assert order == sorted(order) and max(order) > 20
    assert texts == pairs(path, TEMPLATE, seed=1, say=said.append)
    assert texts != pairs(path, TEMPLATE, seed=2, say=said.append)
    assert "16 of 40 pairs" in said[0]


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"instruction": "ask", "output": "Doc 1: a"}, "ask"),
        ({"instruction": "ask", "input": "", "output": "Doc 1: a", "system": "s"}, "ask"),
        ({"instruction": "ask", "input": "more", "output": "Doc 1: a"}, "ask\nmore"),
        ({"messages": [USER, REPLY], "label": "x"}, "ask"),
        ({"messages": [SYSTEM, USER, REPLY]}, "be Google\n\nask"),
        ({"messages": [SYSTEM | {"content": ""}, USER, REPLY]}, "ask"),
    ],
)
def test_pairs_of_others(tmp_path, row, prompt):
    """Guards a loss on the prompt, an input that is lost, and a part of the pairs left out."""
    paths = [write(tmp_path / name, [row] * 3) for name in ("a.jsonl", "b.jsonl")]
    texts = pairs(",".join(paths), TEMPLATE, say=lambda _: None)
    assert texts == [[(prompt, False), ("Doc 1: a", True)]] * 6


def test_the_loss_is_on_the_reply_alone(tmp_path):
    """Guards segments that the tokenising function marks otherwise."""
    path = write(tmp_path / "a.jsonl", [{"messages": [USER, REPLY]}])
    [text] = pairs(path, TEMPLATE, say=lambda _: None)
    tokenizer = make_tokenizer()
    ids, mask = sft.encode(tokenizer, text, end=True)
    assert tokenizer.decode(ids) == "askDoc 1: a<eos>"
    assert mask == [0] * 3 + [1] * 9


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {key: OURS[key] for key in ("query", "label")},
        OURS | {"label": "good"},
        OURS | {"answers": "x"},
        OURS | {"documents": []},
        OURS | {"documents": "one"},
        OURS | {"query": None},
        {"instruction": "ask"},
        {"instruction": "ask", "output": " "},
        {"instruction": None, "output": "a"},
        {"messages": [USER]},
        {"messages": [REPLY]},
        {"messages": [USER, REPLY, USER, REPLY]},
        {"messages": [USER, SYSTEM, REPLY]},
        {"messages": [USER, USER, REPLY]},
        {"messages": "ask"},
        {"messages": [USER, REPLY | {"content": None}]},
    ],
)
def test_a_row_of_no_layout_is_named(tmp_path, row):
    """Guards a traceback, and rows that are left out in silence."""
    with pytest.raises(UserError) as error:
        pairs(write(tmp_path / "a.jsonl", [row]), TEMPLATE)
    message = str(error.value)
    assert message.startswith("Row 1 of ") and "\n" not in message
    assert all(repr(key) in message for key in row if key not in ("documents", "label"))


def test_the_number_is_that_of_the_row(tmp_path):
    """Guards a search through the whole file for what is wrong."""
    path = write(tmp_path / "a.jsonl", [OURS, OURS | {"label": "noisy"}, OURS | {"label": "no"}])
    with pytest.raises(UserError, match="Row 3 of"):
        pairs(path, TEMPLATE)


def test_files_without_pairs(tmp_path):
    """Guards minutes of work before what cannot be trained on is noticed."""
    for rows, words in (([OURS, OURS], "all useful"), ([], "a.jsonl")):
        with pytest.raises(UserError, match=words):
            pairs(write(tmp_path / "a.jsonl", rows), TEMPLATE)
    for spec in ("../nowhere.jsonl", "../base", "world"):
        with pytest.raises(UserError):
            pairs(spec, TEMPLATE)


def test_layouts_may_be_mixed(tmp_path):
    """Guards pairs that are lost because they have no label."""
    ours = write(tmp_path / "a.jsonl", [OURS])
    other = write(tmp_path / "b.jsonl", [{"instruction": "ask", "output": "a"}])
    assert len(pairs(f"{ours},{other}", TEMPLATE, say=lambda _: None)) == 2


def test_a_hub_name(monkeypatch):
    """Guards another split than the one to train on."""
    import datasets

    rows = datasets.Dataset.from_list([{"instruction": "ask", "output": "a"}])
    asked = []

    def load_dataset(*names, revision):
        asked.append((*names, revision))
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([]), "train": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert pairs("org/name:google@main", TEMPLATE) == [[("ask", False), ("a", True)]]
    assert asked == [("org/name", "google", "main")]
    assert data.HUB_NAME.fullmatch("sunhaonlp/SimulationTuning_google_dataset")
