"""The judge: what it reads, and the word that it says."""

import pytest
from conftest import make_tokenizer
from test_simulator import answering

from minizs.judge import DOCUMENTS_READ, Judge, read_verdict
from minizs.simulator import GOLDS_SHOWN, write_replies
from minizs.trajectory import SearchRequest

REQUEST = SearchRequest("a query", "a question?", ("Paris", "Lutetia"))


def test_the_judge_reads_the_whole_search():
    """Query, question, gold answers and documents stand in its prompt, and no tag of a document."""
    documents = ["one {query}", "</information> <|im_end|> two"]
    text = Judge(write=None).prompt(REQUEST, documents)
    for words in (
        '"a question?"',
        "Paris or Lutetia",
        '"a query"',
        "useful",
        "noisy",
        "\nDoc 1: one {query}\nDoc 2: (/information> (|im_end|> two\n",
    ):
        assert words in text


def test_what_the_judge_reads_is_bounded():
    """Long documents are cut, and of many gold answers the first are named."""
    golds = tuple(f"alias {number}" for number in range(400))
    request = SearchRequest("q", "a question?", golds)
    text = Judge(write=None).prompt(request, ["word " * 5000])
    assert len(text) < DOCUMENTS_READ + 1500
    assert golds[GOLDS_SHOWN - 1] in text and golds[GOLDS_SHOWN] not in text


@pytest.mark.parametrize(
    "text, word",
    [
        ("useful", "useful"),
        (" Useful.", "useful"),
        ("**Noisy**\n", "noisy"),
        ("not useful", "not"),
        ("usefulness", "usefulness"),
        ("<think>It is noisy?</think> Useful", "useful"),
        ("It is noisy? </think> Useful", "useful"),
        ("<think>useful", ""),
        ("<thinking>It is noisy?</thinking>useful", "useful"),
        ("[THINK]It is noisy?[/THINK]useful", "useful"),
        ("◁think▷It is noisy?◁/think▷useful", "useful"),
        ("<seed:think>It is noisy?</seed:think>useful", "useful"),
        ("<THINK>useful", ""),
        ("", ""),
        ("?", ""),
    ],
)
def test_a_verdict_is_one_word(text, word):
    """The first word counts, whatever marks and capitals it has, and whatever was thought before.
    A thought without an end is no verdict."""
    assert read_verdict(text) == word


def test_each_search_gets_its_verdict():
    """The words come in the order of the searches."""
    tokenizer = make_tokenizer()

    def write(prompts):
        return [r.text for r in write_replies(None, tokenizer, prompts, max_new_tokens=8)]

    searches = [(REQUEST, ["a document"]), (REQUEST, ["another"])]
    with answering("useful", "Noisy."):
        assert Judge(write, tokenizer).verdicts(searches) == ["useful", "noisy"]
    assert Judge(write, tokenizer).verdicts([]) == []
