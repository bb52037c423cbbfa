"""What a policy is compared with: one generation, with or without what one search found."""

import pytest
from conftest import ScriptedHead, make_model, make_tokenizer

from minizs.evaluation import baselines
from minizs.generate import Decoder
from minizs.rollout import Limits, Policy
from minizs.runs.settings import BASELINES
from minizs.trajectory import Example

TOKENIZER = make_tokenizer()
EXAMPLES = [Example("who is it", ("Rome",)), Example("where?", ("Oslo", "Bergen"))]
DOCUMENTS = [["Rome is big", "it is far"], []]


class Engine:
    def __init__(self):
        self.calls = []

    def search(self, requests):
        self.calls.append(requests)
        return DOCUMENTS


def answer(method: str, says: str, monkeypatch, **options):
    """(trajectories, prompts, settings of the one decoder, what the engine was asked)."""
    seen = []
    engine = Engine()
    model = make_model(vocab_size=len(TOKENIZER), max_position_embeddings=4096)
    model.lm_head = ScriptedHead(TOKENIZER(says)["input_ids"], len(TOKENIZER))

    class Spy(Decoder):
        def __init__(self, model, prompts, **settings):
            seen.append(([TOKENIZER.decode(ids) for ids in prompts], settings))
            super().__init__(model, prompts, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("minizs.rollout.Decoder", Spy)
        policy = Policy(model, TOKENIZER, limits=Limits(turn_tokens=len(says)), temperature=0.0)
        keys = [(4,), (7,)]
        rows = baselines.answer_at_once(method, policy, EXAMPLES, engine, keys=keys, **options)
    [(prompts, settings)] = seen
    return rows, prompts, settings, engine.calls


@pytest.mark.parametrize("method", BASELINES)
def test_what_the_model_is_shown(method, monkeypatch):
    """The question in the wording of the method, with its own documents for rag, and one search."""
    rows, prompts, settings, calls = answer(method, "<answer>Rome</answer>", monkeypatch)
    assert "Question: who is it?\n" in prompts[0] and "Question: where?\n" in prompts[1]
    assert all("begins with <answer>" in text and "{" not in text for text in prompts)
    assert all(("step by step" in text) == (method == "cot") for text in prompts)
    assert not any("<search>" in text for text in prompts)
    assert ("\nDoc 1: Rome is big\nDoc 2: it is far\nQuestion" in prompts[0]) == (method == "rag")
    assert "Doc" not in prompts[1]
    if method == "rag":
        [requests] = calls
        assert [(r.query, r.question, r.answers, r.noisy) for r in requests] == [
            (e.question, e.question, e.answers, False) for e in EXAMPLES
        ]
    else:
        assert not calls
    assert settings["temperature"] == 0.0
    assert [(row.answer, row.truncated) for row in rows] == [("Rome", ""), ("Rome", "")]
    assert [row.turns[0].documents for row in rows] == (DOCUMENTS if calls else [None, None])
    assert [row.searches for row in rows] == ([1, 1] if calls else [0, 0])


@pytest.mark.parametrize(
    "says, ending",
    [("hm", "turn_tokens"), ("<answer>Rome", "turn_tokens"), ("<search>a</search>", "turns")],
)
def test_without_an_answer_there_is_none(says, ending, monkeypatch):
    """A turn without an answer scores nothing, and a search in it is not carried out."""
    rows, _, _, calls = answer("direct", says, monkeypatch)
    assert [(row.answer, row.truncated) for row in rows] == [(None, ending)] * 2
    assert not calls and rows[0].turns[0].text == says


def test_each_turn_is_shown(monkeypatch):
    """The turn is shown when it is written and, for rag, again with the documents."""
    turns = []
    rows, *_ = answer("rag", "<answer>Rome</answer>", monkeypatch, on_turn=turns.append)
    assert turns == [row.turns[0] for row in rows] * 2  # when it is written; with its documents


def test_every_method_has_a_wording():
    """Every method that can be chosen has a prompt, and a place in it for what it shows."""
    folder = baselines.PROMPTS
    for method in BASELINES:
        text = (folder / f"{method}.txt").read_text()
        assert ("{documents}" in text) == (method == "rag") and "{question}" in text
