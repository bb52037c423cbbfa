"""Other machines: JSON over HTTP to one server or several alike, and the engines that ask by it.

A request that fails is sent again, to the next address, after a growing, partly random wait, and a
bounded number of times. Messages hold no server's own words, which might repeat the key."""

import asyncio
import json
import logging
import random
import re
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import httpx2

from minizs import UserError, require
from minizs.engines.corpus import titled
from minizs.engines.ranking import Engine, Ranking
from minizs.trajectory import SearchRequest

for name in ("httpx2", "httpcore2"):
    logging.getLogger(name).setLevel(logging.WARNING)  # below it they write what servers say
RETRIED = (429, 500, 502, 503, 504)  # it may work later; any other refusal is final
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
SERPER, SERPAPI = "https://google.serper.dev", "https://serpapi.com"
AT_ONCE = 8  # queries in one request to a retriever, which fail together
BETWEEN_WRITES = 32  # queries: what an interrupted run may have paid for in vain
Read = Callable[[Any, dict | None], Any]  # (answer, what was posted) -> what is wanted, or raises


class ServiceError(UserError):
    """A server does not answer as it should: which one, what happened, what to do."""


class Client:
    """Asks `urls` (commas between), with at most `concurrency` requests at a time and `timeout`
    seconds a try; with a `query`, all is a GET. `on_error`: what has failed for good is a
    ServiceError ("stop"), or None and a warning ("empty"). UserError for a wrong address."""

    def __init__(
        self,
        urls: str,
        timeout: float = 60.0,
        retries: int = 5,
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
        on_error: str = "stop",
        concurrency: int = 16,
    ) -> None:
        self.urls = [url.strip().rstrip("/") for url in urls.split(",")]
        require(
            all(re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", url) for url in self.urls),
            "A server's address is http://HOST:PORT, with no user or query.",
        )
        self.timeout, self.retries, self.on_error = timeout, retries, on_error
        try:  # no redirects: the headers, and so the key, would go wherever the server says
            self._http = httpx2.AsyncClient(timeout=None, headers=headers, params=query)
        except (ImportError, OSError, ValueError):  # whose words might hold a password
            raise UserError(
                "The environment's proxy or certificates are of no use; mend "
                "HTTPS_PROXY, SSL_CERT_FILE and the like."
            ) from None
        self._room, self._loop = asyncio.Semaphore(concurrency), asyncio.new_event_loop()
        # In a thread of its own: a notebook's loop runs already, and cannot be waited for.
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def reach(self) -> None:
        """Raises ServiceError if no server is there, so that nothing is begun in vain."""
        self.get("/", read=None)

    def get(self, path: str, read: Read | None) -> Any:
        """`read(answer, None)`, or whether anything answers. Raises ServiceError."""
        return asyncio.run_coroutine_threadsafe(self._ask(path, read), self._loop).result()

    def post(self, path: str, payloads: Iterable[dict], read: Read) -> list:
        """`read(answer, payload)` for each of these JSON bodies, in their order; see `on_error`."""

        async def ask_all() -> list:
            tasks = [asyncio.create_task(self._ask(path, read, payload)) for payload in payloads]
            try:
                return await asyncio.gather(*tasks)
            finally:  # the first failure ends it all
                for task in tasks:
                    task.cancel()

        return asyncio.run_coroutine_threadsafe(ask_all(), self._loop).result()

    async def _ask(self, path: str, read: Read | None, payload: dict | None = None) -> Any:
        form = "params" if payload is None or self._http.params else "json"
        method, first = "POST" if form == "json" else "GET", random.randrange(len(self.urls))
        for attempt in range(self.retries + 1):
            wait = min(LONGEST_WAIT, FIRST_WAIT * (2 ** min(attempt, 9) - 1))  # first: none
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            base = self.urls[(first + attempt) % len(self.urls)]
            # Many give an address with its first step, as in http://host:8000/v1: that is as good.
            url = base.removesuffix("/" + path.split("/")[1]) + path
            try:
                async with self._room, asyncio.timeout(self.timeout):
                    response = await self._http.request(method, url, **{form: payload})
                if read is None:
                    return None
                if response.status_code == 200:
                    return read(response.json(), payload)
                problem = f"answered {response.status_code}"
                if response.status_code not in RETRIED:
                    break
            except TimeoutError:
                problem = f"did not answer within {self.timeout:g} seconds"
            except (httpx2.HTTPError, httpx2.InvalidURL, ExceptionGroup):
                problem = "cannot be reached, or broke off"
            except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
                problem = "did not answer in the expected form"
        # Not chained to its cause, whose text might hold the key.
        error = ServiceError(
            f"{url} {problem} (try {attempt + 1}); check that this server runs, "
            "its address, and the key and the model's name if any."
        )
        if self.on_error == "stop" or payload is None:
            raise error
        warnings.warn(f"A search has failed: {error}", stacklevel=1)


class HttpSearch(Ranking):
    """A retriever behind POST /retrieve: Search-R1's or ours (retriever.py), which take many
    queries at a time, or with `wiki` ZeroSearch's, which takes one. Raises ServiceError."""

    def __init__(self, client: Client, top_k: int = 3, wiki: bool = False) -> None:
        super().__init__(top_k, deepest=16 * top_k)
        self.client, self.wiki = client, wiki

    def rank(self, queries: list[str], n: int) -> list[list[str] | None]:
        size = 1 if self.wiki else AT_ONCE
        asked = [queries[i : i + size] for i in range(0, len(queries), size)]
        posts = [
            {"query": some[0], "top_k": n}
            if self.wiki
            else {"queries": some, "topk": n, "return_scores": True}
            for some in asked
        ]
        replies = self.client.post("/retrieve", posts, read_retrieved)
        return [
            documents
            for some, reply in zip(asked, replies, strict=True)
            for documents in reply or [None] * len(some)
        ]


def read_retrieved(answer: Any, asked: dict) -> list[list[str]]:
    """The documents for each query out of an answer of Search-R1's server, with scores or not, or
    out of that of ZeroSearch's wiki server, `[{"text": ...}]`. Raises what odd answers raise."""
    rows = answer["result"] if isinstance(answer, dict) else answer
    rows = rows if "queries" in asked else [rows]
    if len(rows) != len(asked.get("queries", [0])) or not all(isinstance(r, list) for r in rows):
        raise ValueError("not a list of documents for each query")
    return [
        [
            (d["contents"] if "contents" in d else titled(d.get("title"), d["text"])).strip()
            for row in some
            for d in [row.get("document", row)]
        ]
        for some in rows
    ]


class WebSearch(Ranking):
    """Google's first page, by Serper or SerpAPI; if noisy, what is left of it. ServiceError."""

    def __init__(self, client: Client, top_k: int = 3) -> None:
        super().__init__(top_k, deepest=top_k)
        self.client = client

    def rank(self, queries: list[str], n: int) -> list[list[str] | None]:
        # A page of ten costs what one result does.
        asked = [{"q": query, "num": max(10, self.top_k)} for query in queries]
        return self.client.post("/search", asked, read_page)


def read_page(answer: dict, asked: dict) -> list[str]:
    """What was found, if anything. Serper repeats what it was asked; SerpAPI says how it went."""
    if not answer.get("searchParameters") and answer["search_metadata"]["status"] != "Success":
        raise ValueError("it has failed, or is not done; to find nothing is a success")
    rows = answer.get("organic") or answer.get("organic_results") or []
    return [" ".join([row.get("title") or "", row.get("snippet") or ""]) for row in rows]


class Cached(Engine):
    """An engine whose replies, failures apart, are kept in the SQLite file `path`: none is paid for
    twice. `name` tells the engines of one file apart. Raises UserError for a file of no use."""

    def __init__(self, engine: Engine, path: str, name: str) -> None:
        self.engine, self.name = engine, name
        try:  # 60 seconds are what it waits while another process writes
            self.file = sqlite3.connect(path, timeout=60)
            self.file.execute("CREATE TABLE IF NOT EXISTS replies (request PRIMARY KEY, documents)")
            self.kept = dict(self.file.execute("SELECT request, documents FROM replies"))
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot be a cache: {error}; give another file.") from error

    def find(self, requests: list[SearchRequest]) -> list[list[str] | None]:
        # A noisy reply depends on what its question needs, any other on the query alone.
        keys = [
            json.dumps(
                [
                    self.name,
                    self.engine.top_k,
                    r.query,
                    [r.question, r.answers] if r.noisy else None,
                ]
            )
            for r in requests
        ]
        new = {k: r for k, r in zip(keys, requests, strict=True) if k not in self.kept}
        for start in range(0, len(new), BETWEEN_WRITES):
            some = list(new)[start : start + BETWEEN_WRITES]
            found = zip(some, self.engine.find([new[key] for key in some]), strict=True)
            rows = {key: json.dumps(reply) for key, reply in found if reply is not None}
            self.kept |= rows
            with self.file:
                self.file.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", rows.items())
        return [json.loads(self.kept.get(key, "null")) for key in keys]
