"""Stage 1's examples: of scripted searchers in tiny worlds, and of a policy with a real engine."""

from collections import Counter
from functools import partial
from itertools import islice
from random import Random

import pytest
from conftest import ScriptedHead, make_model, make_tokenizer

from minizs import UserError
from minizs.engines.client import ServiceError
from minizs.engines.ranking import BM25, NoDocuments
from minizs.rollout import Limits, Policy, rollout
from minizs.runs import collect
from minizs.trajectory import Example, SearchRequest
from minizs.world.facts import World

TOKENIZER = make_tokenizer()


def test_rows_of_worlds_are_labelled_exactly_and_balanced():
    """Guards labels that are wrong, and one label more often than the other."""
    rows = collect.collect(2, 60, seed=3)
    assert Counter(row["label"] for row in rows) == {"useful": 30, "noisy": 30}
    assert {row["hop"] for row in rows} == {"first", "final"}
    worlds = [World(3 * 100_000 + 50_000 + number) for number in range(2)]
    for row in rows:
        request = collect.request_of(row)
        assert request.noisy == (row["label"] == "noisy")
        [world] = [world for world in worlds if {*row["documents"]} <= {*world.documents}]
        useful = any(world.judge(text, request) for text in row["documents"])
        assert row["label"] == ("useful" if useful else "noisy")
        assert useful or not collect.on_topic(row)
    assert rows == collect.collect(2, 60, seed=3) != collect.collect(2, 60, seed=4)


def test_balanced():
    """Guards rows that are drawn twice, more than asked for, or always from the file's start."""
    rows = [{"label": label} for label in ["useful"] * 3 + ["noisy", "other"] + ["noisy"] * 20]
    for size, half in ((100, 3), (6, 3), (5, 2), (0, 0)):
        kept = collect.balanced(rows, size, Random(0))
        labels = [rows[i]["label"] for i in kept]
        assert Counter(labels) == Counter(useful=half, noisy=half) and len({*kept}) == len(kept)
    assert max(collect.balanced(rows, 6, Random(0))) > 6
    assert collect.balanced(rows[:3], 10, Random(0)) == []


class Engine:
    """BM25 that keeps what it was asked; it finds nothing for the questions that it is told."""

    def __init__(self, empty=()):
        self.real = BM25(["Rome is big", "Oslo is cold", "it is far", "big and cold"], top_k=1)
        self.empty, self.requests = empty, []

    def search(self, requests):
        self.requests += requests
        found = self.real.search(requests)
        return [[] if r.question in self.empty else d for r, d in zip(requests, found, strict=True)]


def searches(*queries: str):
    """A model that puts these queries in each row, turn by turn, and then answers."""
    model = make_model(vocab_size=len(TOKENIZER), max_position_embeddings=4096)
    turns = [f"<search>{query}</search>" for query in queries] + ["<answer>Rome</answer>"]
    script = [i for turn in turns for i in TOKENIZER(turn)["input_ids"]]
    model.lm_head = ScriptedHead(script * 8, len(TOKENIZER))
    return model


def run(model, examples, engine, size=100, batch=64, seed=0, noise=0.0, judge=None):
    limits = Limits(turns=4, turn_tokens=60, context=400)
    policy = Policy(model, TOKENIZER, "{question}", limits, seed=seed)
    play = partial(rollout, policy, engine=engine, noise=noise)
    return collect.collect_with_policy(play, examples, size, batch, judge)


GOLDS = [("Rome", "x"), ("Oslo",), ("Rome",), ("nothing",)]
EXAMPLES = [Example(f"q{i}?", golds) for i, golds in enumerate(GOLDS)]


def test_a_policys_searches_become_rows():
    """Guards labels by another question's gold, and searches that are lost or were not executed."""
    engine = Engine()
    rows = list(run(searches("Rome big", "Oslo"), EXAMPLES, engine))
    expected = {
        (r.query, r.question): any(gold in text for gold in r.answers)
        for r in engine.requests
        for [text] in engine.real.search([r])
    }
    assert len(expected) == 8 and sum(expected.values()) == 3
    assert Counter(row["label"] for row in rows) == {"useful": 3, "noisy": 5}
    for row in rows:
        assert {*row} == {"query", "question", "answers", "documents", "label"}
        assert (row["label"] == "useful") == expected[row["query"], row["question"]]
        assert row["answers"] == list(
            dict(zip((e.question for e in EXAMPLES), GOLDS, strict=True))[row["question"]]
        )
        request = SearchRequest(row["query"], row["question"])
        assert [row["documents"]] == engine.real.search([request])


def test_rows_come_as_soon_as_they_are_there():
    """Guards replies that have been paid for and are lost with what comes after them."""

    class Failing(Engine):
        def search(self, requests):
            if any(request.question != "q0?" for request in requests):
                raise ServiceError("The server is gone.")
            return super().search(requests)

    rows, model = [], searches("Rome big", "Oslo")
    found = run(model, EXAMPLES, Failing(), batch=1)
    with pytest.raises(ServiceError):
        rows.extend(found)
    assert [(row["query"], row["question"]) for row in rows] == [
        ("Rome big", "q0?"),
        ("Oslo", "q0?"),
    ]


def test_rows_of_one_label_are_there_before_they_are_refused():
    """Guards what was paid for, where no balance can be made of it."""
    rows, found = [], run(searches("Oslo"), EXAMPLES[2:], Engine())
    with pytest.raises(UserError, match="'useful': 0, 'noisy': 2}"):
        rows.extend(found)
    assert [row["label"] for row in rows] == ["noisy"] * 2


def test_it_is_a_function_of_the_seed():
    """Guards rows that are drawn by a hidden state."""
    one, same, other = (
        list(run(searches("Rome big", "Oslo"), EXAMPLES * 4, Engine(), seed=seed, noise=0.3))
        for seed in (0, 0, 1)
    )
    assert one == same != other


def test_the_batch_changes_nothing():
    """Guards random numbers that hang on a question's place in its batch: equal in each batch."""
    one, four = (
        list(run(searches("Rome big", "Oslo"), EXAMPLES * 2, Engine(), batch=batch, noise=0.5))
        for batch in (1, 4)
    )
    assert one == four


def test_empty_replies_are_left_out():
    """Guards a simulator that learns to write nothing."""
    rows = [*run(searches("Rome big", "Oslo"), EXAMPLES, Engine(empty=["q3?"]))]
    assert all(row["documents"] and row["question"] != "q3?" for row in rows)
    assert Counter(row["label"] for row in rows) == {"useful": 3, "noisy": 3}
    with pytest.raises(UserError, match="'useful': 0, 'noisy': 0}"):
        list(run(searches("Rome"), EXAMPLES, NoDocuments()))


class Judge:
    """Says its words, one for each request; keeps what it was asked."""

    def __init__(self, words):
        self.words, self.asked = iter(words), []

    def search(self, requests):
        self.asked.append(requests)
        return [word and [word] for word in islice(self.words, len(requests))]


def test_a_judges_word_is_the_label(capsys):
    """Guards the word for another search, labels by the golds all the same, a judge that is asked
    search by search or not told all, and words that are none for "useful"."""
    words = ["noisy", "useful", "the", "useful", [], "usefulness", "useful", "not"]
    plain = list(run(searches("Rome big", "Oslo"), EXAMPLES, Engine()))
    judge, engine = Judge(words), Engine()
    rows = list(run(searches("Rome big", "Oslo"), EXAMPLES, engine, judge=judge))
    assert [row["label"] == "useful" for row in rows] == [word == "useful" for word in words]
    assert [row | {"label": ""} for row in rows] == [row | {"label": ""} for row in plain]
    assert {row["label"] for row in rows} == {"useful", "noisy"}
    [asked] = judge.asked
    assert [(r.query, r.question, [*r.answers], [*r.documents]) for r in asked] == [
        (r["query"], r["question"], r["answers"], r["documents"]) for r in plain
    ]
    assert "4 of 8 words are neither" in capsys.readouterr().out
    judge = Judge(["useful", "noisy"] * 4)  # rows enough are told by its labels
    assert len(list(run(searches("Rome big", "Oslo"), EXAMPLES, engine, 2, 1, judge=judge))) == 2
    with pytest.raises(UserError, match="'useful': 0, 'noisy': 8}"):
        list(run(searches("Rome big", "Oslo"), EXAMPLES, engine, judge=Judge(["noisy"] * 8)))


def test_a_judge_that_judges_nothing_is_not_paid_for():
    """Guards searches for all questions, all noisy, where a model thinks before it speaks."""
    engine = Engine()
    with pytest.raises(UserError, match="neither.*think.*--simulator_api"):
        list(run(searches("Rome big", "Oslo"), EXAMPLES, engine, 2, 1, judge=Judge(["think"] * 8)))
    assert 0 < len(engine.requests) <= 2


def test_it_stops_with_rows_enough():
    """Guards a real engine that is paid for more than what was asked for."""
    engine = Engine()
    found = run(searches("Rome big", "Oslo"), EXAMPLES, engine, 2, batch=1)
    assert len(list(found)) == 2 and {r.question for r in engine.requests} == {"q0?"}
    with pytest.raises(UserError, match="'useful': 0, 'noisy': 0}"):
        list(run(searches(), EXAMPLES, Engine()))
