"""The engines of other machines: a retriever's server, a web search API; and a cache for them."""

import json
import os
import sqlite3
from typing import Any

from minizs.client import Client, ServiceError
from minizs.config import UserError, require
from minizs.engines import Judge, Ranking, holds_answer, titled
from minizs.trajectory import SearchRequest

AT_ONCE = 32  # queries in one request to a retriever, or between two writes to a cache
WEB = {  # provider: address, the variable that holds its key, where its answer has the results
    "serpapi": ("https://serpapi.com", "SERPAPI_API_KEY", "organic_results"),
    "serper": ("https://google.serper.dev", "SERPER_API_KEY", "organic"),
}


def parts(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class HttpSearch(Ranking):
    """A retriever behind POST /retrieve: Search-R1's or ours (retriever.py), which take many
    queries at a time, or with `wiki` ZeroSearch's, which takes one. Raises ServiceError."""

    def __init__(self, client: Client, top_k: int = 3, judge: Judge = holds_answer,
                 wiki: bool = False) -> None:  # fmt: skip
        super().__init__(top_k, judge, deepest=16 * top_k)
        self.client, self.wiki = client, wiki

    def rank(self, queries: list[str], n: int) -> list[list[str]]:
        def ask(some: list[str]) -> list[list[str]]:
            many = {"queries": some, "topk": n, "return_scores": True}
            asked = {"query": some[0], "top_k": n} if self.wiki else many
            return self.client.post("/retrieve", asked, lambda a: read_retrieved(a, len(some)))

        return sum(self.client.map(ask, parts(queries, 1 if self.wiki else AT_ONCE)), [])


def read_retrieved(answer: Any, n: int) -> list[list[str]]:
    """The documents for `n` queries out of an answer of Search-R1's server, with scores or not, or
    out of that of ZeroSearch's wiki server to its one query, `[{"text": ...}]`."""
    rows = answer["result"] if isinstance(answer, dict) else answer
    if n == 1 and (not rows or isinstance(rows[0], dict)):
        rows = [rows]
    if len(rows) != n:
        raise ValueError(f"{len(rows)} replies to {n} queries")
    found = [[row.get("document", row) for row in some] for some in rows]
    return [[(d["contents"] if "contents" in d else titled(d.get("title"), d["text"])).strip()
             for d in some] for some in found]  # fmt: skip


class WebSearch(Ranking):
    """Google's results through "serpapi" or "serper": title and snippet. A noisy request gets what
    is left of the first page. Raises UserError where the key is not set, and ServiceError."""

    def __init__(self, provider: str, top_k: int = 3, judge: Judge = holds_answer, url: str = "",
                 **options: Any) -> None:  # fmt: skip
        super().__init__(top_k, judge, deepest=top_k)
        address, variable, self.field = WEB[provider]
        self._key = os.environ.get(variable, "").strip()
        require(bool(self._key), f"{provider} needs a key; set the variable {variable} to yours.")
        # SerpAPI takes it in the query only.
        self.in_query, headers = provider == "serpapi", {"X-API-KEY": self._key}
        self.client = Client(url or address, headers=headers, **options)

    def rank(self, queries: list[str], n: int) -> list[list[str]]:
        return self.client.map(self._page, queries)

    def _page(self, query: str) -> list[str]:
        asked = {"q": query, "num": max(10, self.top_k)}  # a page costs what one result does
        if self.in_query:
            asked |= {"engine": "google", "api_key": self._key}
            return self.client.get("/search", self._read, asked)
        return self.client.post("/search", asked, self._read)

    def _read(self, answer: dict) -> list[str]:
        error = " ".join(str(answer.get("error") or "").replace(self._key, "***").split())
        if error and "hasn't returned any results" not in error:  # SerpAPI's way to say so
            raise ServiceError(f"answered {error[:200]!r}")
        rows = answer.get(self.field) or []  # there may be other things, or nothing
        return [f"{row.get('title') or ''} {row.get('snippet') or ''}" for row in rows]


class Cached:
    """An engine whose replies are kept in the SQLite file `path`, so that none is paid for twice,
    by this process or another. `name` tells the engines of one file apart. `hits` and `misses`
    count requests, of which equal ones are asked once. Raises UserError for a file of no use."""

    def __init__(self, engine, path: str, name: str) -> None:
        self.engine, self.name, self.hits, self.misses = engine, name, 0, 0
        try:  # 60 seconds are what it waits while another process writes
            self.file = sqlite3.connect(path, timeout=60)
            self.file.execute("CREATE TABLE IF NOT EXISTS replies (request PRIMARY KEY, documents)")
            columns = self.file.execute("SELECT * FROM replies LIMIT 0").description
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot be a cache: {error}; give another file.") from error
        require([name for name, *_ in columns] == ["request", "documents"], f"{path} cannot be a "
                "cache: its table 'replies' is of another form; give another file.")  # fmt: skip

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        """The engine's replies, each kept as soon as it is there."""
        keys = [self._key(request) for request in requests]
        new, known = dict(zip(keys, requests, strict=True)), {}
        for key in new:
            known |= self.file.execute("SELECT * FROM replies WHERE request = ?", [key]).fetchall()
        new = {key: request for key, request in new.items() if key not in known}
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        for some in parts(list(new), AT_ONCE):
            found = self.engine.search([new[key] for key in some])
            rows = list(zip(some, map(json.dumps, found), strict=True))
            with self.file:
                self.file.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", rows)
            known |= rows
        return [json.loads(known[key]) for key in keys]

    def _key(self, request: SearchRequest) -> str:
        # A noisy reply depends on what its question needs, any other on the query alone.
        needed = [request.question, request.answers] if request.noisy else None
        return json.dumps([self.name, self.engine.top_k, request.query, needed])
