"""The retriever's server, from its corpus to an engine that asks it."""

import threading
from contextlib import contextmanager
from unittest import mock

import httpx2
import pytest
from test_ranking import DOCUMENTS, ask

from minizs import UserError
from minizs.engines import retriever
from minizs.engines.bm25 import BM25
from minizs.engines.client import Client
from minizs.engines.http import HttpSearch
from minizs.engines.retriever import main, make_server
from minizs.world.facts import embedded

TEXTS = ['"Ann"\nwas born in Rome', "Ann works for Acme", "Bob was born in Oslo"]


@contextmanager
def running(server):
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def url():
    with running(make_server(BM25(TEXTS, 2), "127.0.0.1", 0)) as address:
        yield address


def post(url, body):
    data = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = httpx2.post(url + "/retrieve", timeout=10, **data)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("wiki", [False, True])
def test_an_engine_that_asks_the_server_is_the_engine_in_it(wiki):
    """Through the server a corpus gives the replies that it gives here."""
    queries = [
        ask(query, noisy)
        for query in ("Ann born in", "Oslo lies", "?", "works for Acme")
        for noisy in (False, True)
    ] * 5
    with running(make_server(BM25(DOCUMENTS), "127.0.0.1", 0)) as address:
        engine = HttpSearch(Client(address, retries=0), 3, wiki=wiki)
        assert engine.search(queries) == BM25(DOCUMENTS, 3).search(queries)


def test_the_published_shapes(url):
    """Answers have the shapes that clients of Search-R1 and ZeroSearch read."""
    status, scored = post(url, {"queries": ["Ann born", "Oslo"], "topk": 1, "return_scores": True})
    [[first], [second]] = scored["result"]
    scores = [hits[0][1] for hits in BM25(TEXTS).scored(["Ann born", "Oslo"], 1)]
    assert status == 200 and [first["score"], second["score"]] == scores and min(scores) > 0
    assert first["document"] == {"contents": TEXTS[0]}  # its line break too: a title ends there
    plain = {"result": [[{"contents": TEXTS[2]}]]}
    assert post(url, {"queries": ["Oslo"], "topk": 1}) == (200, plain)
    assert post(url, {"query": "Oslo", "top_k": 1}) == (200, [{"text": TEXTS[2]}])
    assert post(url, {"queries": [], "topk": 1}) == (200, {"result": []})


def test_how_many_documents(url):
    """The request says how many documents; else the server's default; never more than there are."""
    for options, n in (({}, 2), ({"topk": None}, 2), ({"topk": 1}, 1), ({"topk": 99}, 3)):
        assert len(post(url, {"queries": ["Ann Bob"]} | options)[1]["result"][0]) == n


@pytest.mark.parametrize(
    "body, sentence",
    [
        (b"", "Expecting"),
        (b"{", "Expecting"),
        (b"\xff\xfe", ""),
        ([1], ""),
        ({}, "KeyError('query')"),
        ({"queries": "Ann"}, "is no list"),
        ({"queries": [1]}, ""),
        ({"query": None}, ""),
        ({"query": "a", "top_k": -1}, "not above 0"),
        ({"queries": ["a"], "topk": "3"}, ""),
    ],
)
def test_bad_requests_are_told_so(url, body, sentence):
    """A request that makes no sense is answered with 400 and what is wrong."""
    status, answer = post(url, body)
    assert status == 400 and sentence in answer["error"] and "give 'queries'" in answer["error"]


def serve_once(*flags):
    """What `main` would serve with: its engine."""
    with mock.patch.object(retriever, "make_server") as make:
        main(list(flags))
    make().serve_forever.assert_called_once_with()
    return make.call_args_list[0].args


def test_the_command(tmp_path, capsys):
    """Each flag does what it says, and without a corpus the tiny world is served."""
    engine, host, port = serve_once()
    assert (host, port, engine.top_k) == ("127.0.0.1", 8000, 3)
    assert engine.documents == embedded("test").documents
    (tmp_path / "a.txt").write_text("\n".join(DOCUMENTS))
    engine, host, port = serve_once(
        "--corpus", str(tmp_path / "a.txt"), "--top_k", "1", "--port", "0", "--host", "h"
    )
    assert (host, port) == ("h", 0)
    assert [document["text"] for document in engine.documents] == DOCUMENTS
    assert engine.search([ask("Oslo lies")]) == [[DOCUMENTS[8]]]
    assert "10 documents at" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--corpus", "nowhere.txt"],
        ["--port", "70000"],
        ["--port", "-1"],
        ["--top_k", "0"],
        ["--colour", "red"],
        ["--host", "256.0.0.1"],
    ],
)
def test_what_cannot_be_served(flags):
    """Mistyped flags are one sentence."""
    with pytest.raises(UserError):
        main(flags)


def test_a_port_in_use_is_told(url):
    """A port in use is one sentence."""
    with pytest.raises(UserError, match="Cannot listen at 127.0.0.1"):
        make_server(BM25(TEXTS), "127.0.0.1", int(url.rpartition(":")[2]))
