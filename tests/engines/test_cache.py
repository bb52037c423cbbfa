"""Replies that are kept in a file: none is paid for twice, and no failure is kept."""

import json
import sqlite3
from multiprocessing import get_context

import pytest
from test_ranking import DOCUMENTS, ask

from minizs import UserError
from minizs.engines.bm25 import BM25
from minizs.engines.cache import BETWEEN_WRITES, Cached
from minizs.engines.client import ServiceError


class Counting:
    """BM25 that notes what it was asked, ends at a query "broken", and has none to "failing"."""

    def __init__(self, top_k=2):
        self.engine = BM25(DOCUMENTS, top_k)
        self.top_k = top_k
        self.asked = []

    def find(self, requests):
        if any(request.query == "broken" for request in requests):
            raise ServiceError("The server is gone.")
        self.asked += requests
        replies = self.engine.find(requests)
        return [
            None if request.query == "failing" else documents
            for request, documents in zip(requests, replies, strict=True)
        ]


def test_nothing_is_asked_twice(tmp_path):
    """Equal requests are asked once, within a call, in a run and in later runs."""
    requests = [ask("Ann born"), ask("Oslo"), ask("Ann born"), ask("Ann born", noisy=True)]
    expected = BM25(DOCUMENTS, 2).search(requests)
    path = str(tmp_path / "cache")
    first, later = Counting(), Counting()
    engine = Cached(first, path, "a")
    assert engine.search(requests) == expected and engine.search([]) == []
    assert engine.search(requests[::-1]) == expected[::-1]
    assert len(first.asked) == 3
    assert Cached(later, path, "a").search(requests) == expected and later.asked == []


def test_what_differs_is_asked_anew(tmp_path):
    """A reply belongs to its engine and number of documents, a noisy one to its question too."""
    path = str(tmp_path / "cache")
    engine = Counting()
    Cached(engine, path, "a").search([ask("Ann born"), ask("Ann born", noisy=True)])
    for other, name in ((Counting(), "b"), (Counting(3), "a")):
        Cached(other, path, name).search([ask("Ann born")])
        assert len(other.asked) == 1
    second = Counting()
    cats = ask("Ann born", noisy=True, answers=("cats",))
    assert Cached(second, path, "a").search([cats]) == BM25(DOCUMENTS, 2).search([cats])
    Cached(second, path, "a").search([ask("Ann born", answers=("cats",))])
    assert second.asked == [cats]


def test_failures_are_counted_and_not_kept(tmp_path):
    """A failed request is counted, answered with nothing, and asked again the next time."""
    engine = Cached(inner := Counting(), str(tmp_path / "cache"), "a")
    for _ in range(2):
        replies = engine.search([ask("failing"), ask("Oslo"), ask("failing")])
        assert [len(documents) for documents in replies] == [0, 2, 0]
    assert engine.failed == 4
    assert [request.query for request in inner.asked] == ["failing", "Oslo", "failing"]


def test_what_came_before_a_failure_is_kept(tmp_path):
    """Replies that came before a failure are in the file."""
    requests = [ask(f"Ann {i}") for i in range(BETWEEN_WRITES)]
    path = str(tmp_path / "cache")
    with pytest.raises(ServiceError):
        Cached(Counting(), path, "a").search([*requests, ask("broken")])
    Cached(second := Counting(), path, "a").search(requests)
    assert second.asked == []


def search_much(path, number):
    engine = Cached(Counting(), path, "a")
    for i in range(30):
        engine.search([ask(f"Ann {i}"), ask(f"Bob {number} {i}")])


def test_processes_share_a_cache(tmp_path):
    """Several processes read and write one file."""
    path = str(tmp_path / "cache")
    context = get_context("fork")
    workers = [context.Process(target=search_much, args=(path, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    rows = sqlite3.connect(path).execute("SELECT request, documents FROM replies").fetchall()
    assert len(rows) == 30 * 4 and all(len(json.loads(reply)) == 2 for _, reply in rows)


def test_files_that_are_no_cache(tmp_path):
    """A file that is no cache is refused, and left as it is."""
    (tmp_path / "text").write_text("some other file " * 100)
    for path in (tmp_path / "text", tmp_path, tmp_path / "no" / "where"):
        with pytest.raises(UserError, match="cannot be a cache"):
            Cached(Counting(), str(path), "a")
