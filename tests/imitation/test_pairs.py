"""What a simulator is trained on: three layouts of a row, and what is none."""

import pytest
from conftest import make_tokenizer

from minizs import UserError, sft
from minizs.imitation.pairs import make_pairs

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
    """A simulator is trained on the words that it will be asked with."""
    noisy = OURS | {"label": "noisy", "documents": ["three"]}
    texts = make_pairs([noisy, OURS], TEMPLATE)
    assert texts == [
        [("q who? x or y 1 noisy", False), ("Doc 1: three", True)],
        [("q who? x or y 2 useful", False), ("Doc 1: one\nDoc 2: two", True)],
    ]


def test_our_rows_are_balanced():
    """As many useful as noisy rows are taken, in the order of the file, from all of it."""
    rows = [OURS | {"query": f"q{i}", "label": "noisy" if i % 5 else "useful"} for i in range(40)]
    texts = make_pairs(rows, TEMPLATE, seed=1)
    prompts = [prompt.split() for [(prompt, _), _] in texts]
    assert [words[-1] for words in prompts].count("useful") == 8 and len(prompts) == 16
    order = [int(words[0][1:]) for words in prompts]
    assert order == sorted(order) and max(order) > 20
    assert texts == make_pairs(rows, TEMPLATE, seed=1) != make_pairs(rows, TEMPLATE, seed=2)


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
    """Rows of instructions and of messages keep their wording, and none is left out."""
    texts = make_pairs([row] * 6, TEMPLATE)
    assert texts == [[(prompt, False), ("Doc 1: a", True)]] * 6


def test_the_loss_is_on_the_reply_alone():
    """The mask is 1 on the reply and its end, and 0 on the prompt."""
    [text] = make_pairs([{"messages": [USER, REPLY]}], TEMPLATE)
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
    """One sentence says which row it is and what it holds."""
    with pytest.raises(UserError) as error:
        make_pairs([row], TEMPLATE)
    message = str(error.value)
    assert message.startswith("Row 1 of ") and "\n" not in message
    assert all(repr(key) in message for key in row if key not in ("documents", "label"))


def test_the_number_is_that_of_the_row():
    """Rows are counted from 1, as an editor counts lines."""
    with pytest.raises(UserError, match="Row 3 of"):
        make_pairs([OURS, OURS | {"label": "noisy"}, OURS | {"label": "no"}], TEMPLATE)


def test_rows_without_pairs():
    """An empty file, or one label alone, is refused."""
    for rows in ([OURS, OURS], []):
        with pytest.raises(UserError, match="empty, or .* all useful"):
            make_pairs(rows, TEMPLATE)


def test_layouts_may_be_mixed():
    """Where a row has no label, no row is left out."""
    rows = [OURS, {"instruction": "ask", "output": "a"}]
    assert len(make_pairs(rows, TEMPLATE)) == 2
