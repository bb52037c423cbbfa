"""Stage 1's examples: of scripted searchers in tiny worlds, and of a searcher with a real
engine."""

from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from conftest import ScriptedHead, make_model, make_tokenizer

from minizs import UserError
from minizs.engines.bm25 import BM25
from minizs.engines.client import ServiceError
from minizs.engines.ranking import NoDocuments
from minizs.imitation import collect
from minizs.imitation.demonstrations import read_demonstrations
from minizs.rollout import Limits, Policy, rollout
from minizs.runs.run_folder import read_lines, write_lines
from minizs.trajectory import Example, SearchRequest
from minizs.world.facts import LARGE, World
from minizs.world.searchers import states_what_was_asked

TOKENIZER = make_tokenizer()
GOLDS = [("Rome", "x"), ("Oslo",), ("Rome",), ("nothing",)]
EXAMPLES = [Example(f"q{i}?", golds) for i, golds in enumerate(GOLDS)]


def test_rows_of_worlds_are_labelled_exactly_and_balanced():
    """Half of the rows are useful; a label is the world's own judgement; no noisy row states the
    fact that was asked for; and the seed decides them all."""
    rows = collect.collect_from_worlds(2, 60, seed=3)
    assert Counter(row["label"] for row in rows) == {"useful": 30, "noisy": 30}
    assert {row["hop"] for row in rows} == {"first", "final"}
    worlds = [World(3 * 100_000 + 50_000 + number, **LARGE) for number in range(2)]
    for row in rows:
        request = collect.request_of(row)
        assert request.noisy == (row["label"] == "noisy")
        [world] = [world for world in worlds if {*row["documents"]} <= {*world.documents}]
        useful = any(world.judge(text, request) for text in row["documents"])
        assert row["label"] == ("useful" if useful else "noisy")
        assert useful or not states_what_was_asked(row["query"], row["documents"])
    assert rows == collect.collect_from_worlds(2, 60, seed=3)
    assert rows != collect.collect_from_worlds(2, 60, seed=4)


def test_a_row_of_a_world_has_documents(monkeypatch):
    """A search that found nothing teaches a simulator nothing, and is no row."""

    def search(engine, requests):
        return [[] if request.noisy else [engine.documents[0]] for request in requests]

    monkeypatch.setattr(collect.BM25, "search", search)
    monkeypatch.setattr(collect, "draw_balanced", lambda rows, size, rng: range(len(rows)))
    rows = collect.collect_from_worlds(1, 40, seed=3)
    assert rows and all(row["documents"] for row in rows)


def test_a_balanced_draw():
    """It has as many rows of one label as of the other, no row twice, none of another label, and
    rows from the whole file."""
    rows = [{"label": label} for label in ["useful"] * 3 + ["noisy", "other"] + ["noisy"] * 20]
    for size, half in ((100, 3), (6, 3), (5, 2), (0, 0)):
        places = collect.draw_balanced(rows, size, Random(0))
        labels = [rows[place]["label"] for place in places]
        assert Counter(labels) == Counter(useful=half, noisy=half)
        assert len({*places}) == len(places)
    assert max(collect.draw_balanced(rows, 6, Random(0))) > 6
    assert collect.draw_balanced(rows[:3], 10, Random(0)) == []


class Engine:
    """BM25 that remembers its requests; it finds nothing for the questions in `empty`."""

    def __init__(self, empty=()):
        self.real = BM25(["Rome is big", "Oslo is cold", "it is far", "big and cold"], top_k=1)
        self.empty = empty
        self.requests = []

    def search(self, requests):
        self.requests += requests
        replies = self.real.search(requests)
        return [
            [] if request.question in self.empty else documents
            for request, documents in zip(requests, replies, strict=True)
        ]


def policy_with(*queries: str):
    """A model that puts these queries in each row, turn by turn, and then answers."""
    model = make_model(vocab_size=len(TOKENIZER), max_position_embeddings=4096)
    turns = [f"<search>{query}</search>" for query in queries] + ["<answer>Rome</answer>"]
    script = [token for turn in turns for token in TOKENIZER(turn)["input_ids"]]
    model.lm_head = ScriptedHead(script * 8, len(TOKENIZER))
    return model


@pytest.fixture
def run(tmp_path):
    """Collects in a folder and returns the rows; the folder is new each time if none is given."""
    folders = iter(range(100))

    def collect_all(
        model, examples, engine, size=100, batch=64, seed=0, noise=0.0, judge=None, folder=None
    ):
        folder = folder or tmp_path / f"collection-{next(folders)}"
        folder.mkdir(exist_ok=True)
        limits = Limits(turns=4, turn_tokens=60, context=400)
        policy = Policy(model, TOKENIZER, "{question}", limits, seed=seed)
        play = partial(rollout, policy, engine=engine, noise=noise)
        collection = collect.Collection(folder)
        collect.collect_from_searches(play, examples, size, collection, judge, batch)
        assert read_lines(collection.file) == collection.rows
        return collection.rows

    return collect_all


def rows_in(folder: Path) -> list[dict]:
    return read_lines(folder / "collected.jsonl")


def test_a_policys_searches_become_rows(run):
    """Each search that was carried out is a row with its own question's answers and its own
    documents, useful where one of these holds an answer."""
    engine = Engine()
    rows = run(policy_with("Rome big", "Oslo"), EXAMPLES, engine)
    expected = {
        (request.query, request.question): any(gold in text for gold in request.answers)
        for request in engine.requests
        for [text] in engine.real.search([request])
    }
    assert len(expected) == 8 and sum(expected.values()) == 3
    assert Counter(row["label"] for row in rows) == {"useful": 3, "noisy": 5}
    golds = {example.question: list(example.answers) for example in EXAMPLES}
    for row in rows:
        assert {*row} == {"query", "question", "answers", "documents", "label"}
        assert (row["label"] == "useful") == expected[row["query"], row["question"]]
        assert row["answers"] == golds[row["question"]]
        request = SearchRequest(row["query"], row["question"])
        assert [row["documents"]] == engine.real.search([request])


class Failing(Engine):
    """An engine that is gone from the second question on."""

    def search(self, requests):
        if any(request.question != "q0?" for request in requests):
            raise ServiceError("The server is gone.")
        return super().search(requests)


def test_rows_are_on_the_disk_before_the_next_batch_is_asked(run, tmp_path):
    """A service that dies takes nothing with it that was paid for in earlier batches."""
    folder = tmp_path / "broken"
    with pytest.raises(ServiceError):
        run(policy_with("Rome big", "Oslo"), EXAMPLES, Failing(), batch=1, folder=folder)
    assert [(row["query"], row["question"]) for row in rows_in(folder)] == [
        ("Rome big", "q0?"),
        ("Oslo", "q0?"),
    ]


def test_a_collection_goes_on_where_it_broke_off(run, tmp_path):
    """It asks no question twice, and ends with the rows of an unbroken collection."""
    whole = run(policy_with("Rome big", "Oslo"), EXAMPLES, Engine(), noise=0.5, batch=1)
    folder = tmp_path / "broken"
    model = policy_with("Rome big", "Oslo")
    with pytest.raises(ServiceError):
        run(model, EXAMPLES, Failing(), noise=0.5, batch=1, folder=folder)
    engine = Engine()
    model = policy_with("Rome big", "Oslo")
    assert run(model, EXAMPLES, engine, noise=0.5, batch=1, folder=folder) == whole
    assert {request.question for request in engine.requests} == {"q1?", "q2?", "q3?"}


def test_trajectories_are_kept_for_a_warm_start(run, tmp_path):
    """A line for each question that was asked, once, in the form of a demonstration, also in a
    collection that broke off between two batches or within one."""
    whole = tmp_path / "whole"
    run(policy_with("Rome big", "Oslo"), EXAMPLES, Engine(), folder=whole)
    trajectories = read_demonstrations(whole / "trajectories.jsonl")
    assert [trajectory.example for trajectory in trajectories] == EXAMPLES
    for trajectory in trajectories:
        assert [turn.action for turn in trajectory.turns] == ["search", "search", "answer"]
        assert [turn.content for turn in trajectory.turns] == ["Rome big", "Oslo", "Rome"]
        assert trajectory.reward == float("Rome" in trajectory.example.answers)
    folder = tmp_path / "broken"
    model = policy_with("Rome big", "Oslo")
    with pytest.raises(ServiceError):
        run(model, EXAMPLES, Failing(), batch=1, folder=folder)
    lines = read_lines(folder / "trajectories.jsonl")
    write_lines(folder / "trajectories.jsonl", lines)  # of a batch that was not noted
    run(policy_with("Rome big", "Oslo"), EXAMPLES, Engine(), batch=1, folder=folder)
    assert read_demonstrations(folder / "trajectories.jsonl") == trajectories


def test_a_batch_without_its_note_is_asked_again(run, tmp_path, monkeypatch):
    """After a kill between the rows of a batch and the note that it is done, no row is there
    twice."""
    folder = tmp_path / "broken"
    note = collect.Collection._replace
    notes = iter(range(100))

    def killed(path, rows):
        if path.name == "progress.json" and next(notes) == 1:
            raise KeyboardInterrupt
        note(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(collect.Collection, "_replace", staticmethod(killed))
        with pytest.raises(KeyboardInterrupt):
            run(policy_with("Rome big", "Oslo"), EXAMPLES, Engine(), batch=1, folder=folder)
    assert len(rows_in(folder)) == 4  # two questions, one of them noted
    rows = run(policy_with("Rome big", "Oslo"), EXAMPLES, Engine(), batch=1, folder=folder)
    assert rows == run(policy_with("Rome big", "Oslo"), EXAMPLES, Engine(), batch=1)


def test_rows_of_one_label_are_refused_and_stay(run, tmp_path):
    """No simulator can learn from them, but they were paid for, and the sentence says where they
    are."""
    folder = tmp_path / "noisy"
    with pytest.raises(UserError, match="'useful': 0, 'noisy': 2}.*noisy/collected.jsonl"):
        run(policy_with("Oslo"), EXAMPLES[2:], Engine(), folder=folder)
    assert [row["label"] for row in rows_in(folder)] == ["noisy"] * 2


def test_it_is_a_function_of_the_seed(run):
    """The same seed gives the same rows, and another seed others."""
    one, same, other = (
        run(policy_with("Rome big", "Oslo"), EXAMPLES * 4, Engine(), seed=seed, noise=0.3)
        for seed in (0, 0, 1)
    )
    assert one == same != other


def test_the_batch_changes_nothing(run):
    """Random numbers depend on a question's place among all questions, not on its batch."""
    one, four = (
        run(policy_with("Rome big", "Oslo"), EXAMPLES * 2, Engine(), batch=batch, noise=0.5)
        for batch in (1, 4)
    )
    assert one == four


def test_empty_replies_are_left_out(run):
    """A simulator must not learn to write nothing."""
    rows = run(policy_with("Rome big", "Oslo"), EXAMPLES, Engine(empty=["q3?"]))
    assert all(row["documents"] and row["question"] != "q3?" for row in rows)
    assert Counter(row["label"] for row in rows) == {"useful": 3, "noisy": 3}
    with pytest.raises(UserError, match="'useful': 0, 'noisy': 0}"):
        run(policy_with("Rome"), EXAMPLES, NoDocuments())


def test_replies_to_a_yes_or_no_question_need_a_judge(run):
    """The gold answers cannot tell which of them are useful, and a language model can."""
    examples = [*EXAMPLES, Example("is Rome big?", ("yes",))]
    rows = run(policy_with("Rome big", "Oslo"), examples, Engine())
    assert {row["question"] for row in rows} == {"q0?", "q1?", "q2?", "q3?"}
    judge = Judge(["useful", "noisy"] * 5)
    rows = run(policy_with("Rome big", "Oslo"), examples, Engine(), judge=judge)
    assert "is Rome big?" in {row["question"] for row in rows} and len(rows) == 10


class Judge:
    """Says its words, one for each search, and remembers the searches."""

    def __init__(self, words):
        self.words = iter(words)
        self.batches = []

    def verdicts(self, searches):
        self.batches.append(searches)
        return list(islice(self.words, len(searches)))


def test_a_judges_word_is_the_label(run, capsys):
    """A row is useful if the judge's word for it is "useful", and noisy for any other word. The
    judge sees query, question, answers and documents of a whole batch, and nothing else of a row
    changes."""
    words = ["noisy", "useful", "the", "useful", "", "usefulness", "useful", "not"]
    queries = ("Rome big", "Oslo")
    by_gold = run(policy_with(*queries), EXAMPLES, Engine())
    judge = Judge(words)
    rows = run(policy_with(*queries), EXAMPLES, Engine(), judge=judge)
    assert [row["label"] == "useful" for row in rows] == [word == "useful" for word in words]
    assert [row | {"label": ""} for row in rows] == [row | {"label": ""} for row in by_gold]
    assert {row["label"] for row in rows} == {"useful", "noisy"}
    [searches] = judge.batches
    assert [(r.query, r.question, [*r.answers], texts) for r, texts in searches] == [
        (r["query"], r["question"], r["answers"], r["documents"]) for r in by_gold
    ]
    assert "4 of 8 words are neither" in capsys.readouterr().out
    judge = Judge(["useful", "noisy"] * 4)  # its labels tell when there are rows enough
    assert len(run(policy_with(*queries), EXAMPLES, Engine(), size=2, batch=1, judge=judge)) == 2
    with pytest.raises(UserError, match="'useful': 0, 'noisy': 8}"):
        run(policy_with(*queries), EXAMPLES, Engine(), judge=Judge(["noisy"] * 8))


def test_a_judge_that_judges_nothing_stops_the_collection(run):
    """A model that thinks before it speaks labels nothing: no further search is paid for."""
    engine = Engine()
    judge = Judge(["think"] * 8)
    with pytest.raises(UserError, match="neither.*think.*--simulator_api"):
        run(policy_with("Rome big", "Oslo"), EXAMPLES, engine, size=2, batch=1, judge=judge)
    assert 0 < len(engine.requests) <= 2


def test_it_stops_with_rows_enough(run):
    """A real engine is asked no further question when both labels have their half."""
    engine = Engine()
    rows = run(policy_with("Rome big", "Oslo"), EXAMPLES, engine, size=2, batch=1)
    assert len(rows) == 2 and {request.question for request in engine.requests} == {"q0?"}
    with pytest.raises(UserError, match="'useful': 0, 'noisy': 0}"):
        run(policy_with(), EXAMPLES, Engine())
