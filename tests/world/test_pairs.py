"""What a simulator is trained on: three layouts of a row, and what is none."""

import pytest
from conftest import make_tokenizer

from minizs import UserError, sft
from minizs.runs.collect import pairs

OURS = {
    "query": "q",
    "question": "who?",
    "answers": ["x", "y"],
    "documents": ["one", "two"],
    "label": "useful",
}
TEMPLATE = "{query} {question} {answers} {top_k} {quality}"
USER, REPLY = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "Doc 1: a"}
SYSTEM = {"role": "system", "content": "be Google"}


def test_our_rows_are_asked_with_the_template():
    """Guards a simulator that is trained on other words than it is asked with."""
    noisy = OURS | {"label": "noisy", "documents": ["three"]}
    texts = pairs([noisy, OURS], TEMPLATE)
    assert texts == [
        [("q who? x or y 1 noisy", False), ("Doc 1: three", True)],
        [("q who? x or y 2 useful", False), ("Doc 1: one\nDoc 2: two", True)],
    ]


def test_our_rows_are_balanced():
    """Guards a simulator that learns one word only, and a choice by place in the file."""
    rows = [OURS | {"query": f"q{i}", "label": "noisy" if i % 5 else "useful"} for i in range(40)]
    texts = pairs(rows, TEMPLATE, seed=1)
    asked = [prompt.split() for [(prompt, _), _] in texts]
    assert [words[-1] for words in asked].count("useful") == 8 and len(asked) == 16
    order = [int(words[0][1:]) for words in asked]
    assert order == sorted(order) and max(order) > 20
    assert texts == pairs(rows, TEMPLATE, seed=1) != pairs(rows, TEMPLATE, seed=2)


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"instruction": "ask", "output": "Doc 1: a"}, "ask"),
        ({"instruction": "ask", "input": "", "output": "Doc 1: a", "system": "s"}, "ask"),
        ({"instruction": "ask", "input": "more", "output": "Doc 1: a"}, "ask\nmore"),
        ({"messages": [USER, REPLY], "label": "x"}, "ask"),
    ],
)
def test_pairs_of_others(row, prompt):
    """Guards a loss on the prompt, an input that is lost, and a part of the pairs left out."""
    texts = pairs([row] * 6, TEMPLATE)
    assert texts == [[(prompt, False), ("Doc 1: a", True)]] * 6


def test_the_loss_is_on_the_reply_alone():
    """Guards segments that the tokenising function marks otherwise."""
    [text] = pairs([{"messages": [USER, REPLY]}], TEMPLATE)
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
        {"messages": [SYSTEM, USER, REPLY]},
        {"messages": [USER, USER, REPLY]},
        {"messages": "ask"},
        {"messages": [USER, REPLY | {"content": None}]},
    ],
)
def test_a_row_of_no_layout_is_named(row):
    """Guards a traceback, and rows that are left out in silence."""
    with pytest.raises(UserError) as error:
        pairs([row], TEMPLATE)
    message = str(error.value)
    assert message.startswith("Row 1 of ") and "\n" not in message
    assert all(repr(key) in message for key in row if key not in ("documents", "label"))


def test_the_number_is_that_of_the_row():
    """Guards a search through the whole file for what is wrong."""
    with pytest.raises(UserError, match="Row 3 of"):
        pairs([OURS, OURS | {"label": "noisy"}, OURS | {"label": "no"}], TEMPLATE)


def test_rows_without_pairs():
    """Guards minutes of work before what cannot be trained on is noticed."""
    for rows in ([OURS, OURS], []):
        with pytest.raises(UserError, match="empty, or .* all useful"):
            pairs(rows, TEMPLATE)


def test_layouts_may_be_mixed():
    """Guards pairs that are lost because they have no label."""
    rows = [OURS, {"instruction": "ask", "output": "a"}]
    assert len(pairs(rows, TEMPLATE)) == 2
