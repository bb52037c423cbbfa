"""Servers at their worst: nothing hangs, nothing passes for "no information", nothing is lost."""

import gc
import http.server
import json
import random
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from counts import COUNTS
from scripts import metrics, policy
from servers import Server

from minizs import UserError
from minizs.engines.cache import Cached
from minizs.engines.client import Client
from minizs.engines.http import HttpSearch
from minizs.engines.served import ServedModel, ServedSearch
from minizs.protocol import neutralize, split_documents
from minizs.trajectory import SearchRequest

TIMEOUT = 0.25
NONSENSE = [  # to a question for documents or a completion alike: wrong shapes, numbers, nulls
    None,
    7,
    "",
    {},
    [None],
    {"result": None},
    {"result": {}},
    {"result": [[{"contents": 5}]]},
    {"result": [[None]]},
    {"result": [[{"document": None}]]},
    {"result": [[], [], []] * 40},
    {"choices": []},
    {"choices": None},
    {"choices": [{"text": 5, "finish_reason": "stop"}]},
    {"choices": [{"text": None, "finish_reason": "stop"}]},
    {"choices": [{"text": "Doc 1: a"}]},
    {"choices": [{"text": "Doc 1: a", "finish_reason": "stop"}] * 2},
    {"choices": [{"text": "", "finish_reason": "stop"}]},
]
KINDS = (
    "silent",
    "drip",
    "drip head",
    "gone",
    "nothing",
    "half",
    "html",
    "deep",
    "nonsense",
    429,
    500,
    502,
    503,
    504,
)


class FaultyHandler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's `share` and `hopeless` say; its `kinds` note how it went."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            rng = self.server.rng
            kind = rng.choice(KINDS) if rng.random() < self.server.share else "good"
            nonsense = rng.choice(NONSENSE)
        kind = 500 if self.server.hopeless in str(body) else kind
        self.server.kinds.append(kind)
        if kind == "silent":
            self.server.closing.wait(4 * TIMEOUT)
        elif kind == "drip head":
            self.drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000)
        elif kind == "drip":
            self.drip(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 1000)
        elif kind == "gone":
            self.close_connection = True
        elif isinstance(kind, int):
            self.send(kind, b"<html>no</html>", {"Retry-After": "0"})
        else:
            good = json.dumps(right(body)).encode()
            bad = {
                "nothing": b"",
                "half": good[: len(good) // 2],
                "html": b"<html>hi</html>",
                "deep": b"[" * 100_000,
                "nonsense": json.dumps(nonsense).encode(),
            }
            self.send(200, bad.get(kind, good))

    def send(self, status, content, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def drip(self, content):
        self.close_connection = True
        for byte in content:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.closing.wait(TIMEOUT / 10):
                return

    def handle(self):
        with suppress(OSError):  # the client has given up
            super().handle()

    def finish(self):
        with suppress(OSError):
            super().finish()

    def log_message(self, *_):
        """Quiet."""


@contextmanager
def faulty(share, seed=0, hopeless="hopeless"):
    """A simulator's server and a retriever, which fail a request with this probability in one of
    `KINDS`, and always one that holds the word `hopeless`. Yields its address and the kinds."""
    server = Server(("127.0.0.1", 0), FaultyHandler)
    server.daemon_threads = True
    server.share = share
    server.hopeless = hopeless
    server.rng = random.Random(seed)
    server.lock = threading.Lock()
    server.closing = threading.Event()
    server.kinds = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.kinds
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def right(body):
    """The true answer to a request, in which each query has a document of its own."""
    if "prompt" in body:
        query = body["prompt"].split("|")[0]
        return {"choices": [{"text": f"Doc 1: on {query}", "finish_reason": "stop"}]}
    if "query" in body:
        return [{"text": f"on {body['query']}"}]
    texts = [{"contents": f"on {query}"} for query in body["queries"]]
    return {"result": [[{"document": text, "score": 1}] for text in texts]}


def engine_of(kind, url, retries, folder=None):
    client = Client(url, timeout=TIMEOUT, retries=retries, concurrency=12, on_error="empty")
    if kind == "simulator":
        return ServedSearch(ServedModel(client, "m"), "{query}|{question}")
    engine = HttpSearch(client, 1, wiki=kind == "wiki")
    return Cached(engine, str(folder / "cache"), "a") if kind == "cached" else engine


@pytest.fixture
def no_collection():
    """A collection amid the reading of a reply nested too deep has no stack left to warn on."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.filterwarnings("ignore:A search has failed")
@pytest.mark.parametrize(
    "kind, n, retries",
    [
        ("simulator", 1000, 1),
        ("retriever", 500, 0),
        ("wiki", 100, 10),
        ("cached", 300, 1),
    ],
)
def test_queries_with_faults_of_all_kinds(kind, n, retries, tmp_path, monkeypatch):
    """Every query is answered right or counted as failed, and nothing hangs."""
    monkeypatch.setattr("minizs.engines.client.FIRST_WAIT", 0.001)
    queries = ["hopeless" if i % 100 == 99 else f"query {i}" for i in range(n)]
    with faulty(0.3) as (url, seen):
        engine = engine_of(kind, url, retries, tmp_path)
        start = time.monotonic()
        requests = [SearchRequest(query, "?", key=(i,)) for i, query in enumerate(queries)]
        replies = engine.search(requests)
        seconds = time.monotonic() - start
    answered = [reply == [f"on {query}"] for query, reply in zip(queries, replies, strict=True)]
    empty = sum(reply == [] for reply in replies)
    hopeless = n // 100
    assert len(replies) == n and sum(answered) + empty == n and not any(answered[99::100])
    assert empty == engine.failed >= hopeless
    assert engine.failed == hopeless if retries == 10 else engine.failed < 0.9 * n
    if n == 1000 and kind == "simulator":
        assert {*KINDS, "good"} == {*seen}
    assert seconds < 100  # a few, but where the machine is busy
    COUNTS["queries to faulty servers, each answered right or counted as failed"] += n
    COUNTS["faults of servers"] += sum(kind != "good" for kind in seen)
    if kind == "cached":  # which keeps what was answered, and no failure
        rows = engine.file.execute("SELECT request FROM replies").fetchall()
        assert {json.loads(key)[2] for [key] in rows} == {
            query for query, right in zip(queries, answered, strict=True) if right
        }


@pytest.mark.filterwarnings("ignore:A search has failed")
def test_training_with_a_faulty_simulator(work, monkeypatch):
    """With --on_search_error empty a run ends well, and its metrics count the failed searches."""
    monkeypatch.setattr("minizs.engines.client.FIRST_WAIT", 0.001)
    (work / "mine.txt").write_text("{query}|{question}|{answers}|{quality}")
    flags = [
        "--engine",
        "simulator",
        "--simulator_model",
        "m",
        "--simulator_template",
        "mine.txt",
        "--retries",
        "0",
        "--timeout",
        "0.5",
        "--output",
    ]
    with faulty(0.5) as (url, seen):
        policy(*flags, "run", "--simulator", url, "--on_search_error", "empty")
        faults = sum(kind != "good" for kind in seen)
        with pytest.raises(UserError, match=url):
            policy(*flags, "stopped", "--simulator", url)
    lines = (work / "run" / "trajectories.jsonl").read_text().splitlines()
    turns = [turn for line in lines for turn in json.loads(line)["turns"]]
    searches = [(t["content"], t["documents"]) for t in turns if t["documents"] is not None]
    for query, reply in searches:
        assert reply in ([], split_documents(f"Doc 1: on {neutralize(query)}", 3))
    empty = sum(reply == [] for _, reply in searches)
    assert 0 < faults <= empty < len(searches)  # a busy machine may be late with a good answer
    assert sum(row["search_errors"] for row in metrics(work / "run")) == empty
