"""The texts that policy and search engine exchange."""

import pytest

from minizs import protocol
from minizs.protocol import Action, parse_action


@pytest.mark.parametrize(
    "text, kind, content",
    [
        ("<think> hm </think> <search> a b </search>", "search", "a b"),
        ("<answer>\nParis\n</answer>\n", "answer", "Paris"),
        ("<answer></answer>", "answer", ""),  # it answered, with nothing
        ("<search> \n </search>", "invalid", ""),
        ("<search>a</answer>", "invalid", ""),
        ("<answer> Paris", "invalid", ""),
        ("Paris </answer>", "invalid", ""),
        ("<Search>a</Search>", "invalid", ""),
        ("", "invalid", ""),
    ],
)
def test_actions(text, kind, content):
    """Guards blank queries, unclosed and mixed tags, and contents of several lines."""
    assert parse_action(text) == Action(kind, content)


def test_the_first_closed_pair_decides():
    """Guards D13: a search was preferred even to an answer that came before it."""
    answer, search = "<answer>a</answer>", "<search>b</search>"
    assert parse_action(answer + search) == Action("answer", "a")
    assert parse_action(search + answer) == Action("search", "b")
    assert parse_action("<answer> or " + search) == Action("search", "b")


def test_prompt():
    """Guards a question that is lost, changed, or read as a pattern."""
    text = protocol.build_prompt("  who wrote {question} ")
    assert text.endswith("Question: who wrote {question}?\n")
    assert protocol.build_prompt("who?", "Q: {question} A:") == "Q: who? A:"
    for tag in ("think", "search", "information", "answer"):
        assert f"<{tag}>" in protocol.PROMPT


def test_documents_come_back_as_they_were_written():
    """Guards a simulator whose documents are lost, joined, or more than asked for."""
    documents = ["one", "two words", "3"]
    text = protocol.number_documents(documents)
    assert text == "Doc 1: one\nDoc 2: two words\nDoc 3: 3"
    assert protocol.split_documents(text, 9) == documents
    assert protocol.split_documents(text, 2) == documents[:2]
    assert protocol.split_documents("chat Doc 1:  a\n b Doc 2: \n\nDoc 10: c", 9) == ["a b", "c"]
    assert protocol.split_documents("no documents", 9) == []
    assert protocol.number_documents([]) == ""


def test_documents_are_wrapped():
    """Guards an observation that opens without closing."""
    block = protocol.wrap_documents("Doc 1: a")
    assert block == "\n\n<information>\nDoc 1: a\n</information>\n\n"
