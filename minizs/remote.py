"""The engines of other machines: a retriever's server, a web search API; and a cache for them."""

import json
import sqlite3
from typing import Any

from minizs.client import Client
from minizs.config import UserError
from minizs.engines import Engine, Judge, Ranking, holds_answer, titled
from minizs.trajectory import SearchRequest

SERPER = "https://google.serper.dev"
AT_ONCE = 32  # queries in one request to a retriever, or between two writes to a cache


def parts(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class HttpSearch(Ranking):
    """A retriever behind POST /retrieve: Search-R1's or ours (retriever.py), which take many
    queries at a time, or with `wiki` ZeroSearch's, which takes one. Raises ServiceError."""

    def __init__(self, client: Client, top_k: int = 3, judge: Judge = holds_answer,
                 wiki: bool = False) -> None:  # fmt: skip
        super().__init__(top_k, judge, deepest=16 * top_k)
        self.client, self.wiki = client, wiki

    def rank(self, queries: list[str], n: int) -> list[list[str] | None]:
        found: dict[str, list[str]] = {}
        # One that a server chokes on empties no other: what fails together is asked one by one.
        for size in (1,) if self.wiki else (AT_ONCE, 1):
            asked = parts([q for q in dict.fromkeys(queries) if q not in found], size)
            bodies = [{"query": some[0], "top_k": n} if self.wiki else
                      {"queries": some, "topk": n, "return_scores": True}
                      for some in asked]  # fmt: skip
            replies = self.client.post("/retrieve", bodies, read_retrieved)
            for some, reply in zip(asked, replies, strict=True):
                found.update(zip(some, reply, strict=True) if reply else ())
        return [found.get(query) for query in queries]


def read_retrieved(answer: Any, asked: dict) -> list[list[str]]:
    """The documents for each query out of an answer of Search-R1's server, with scores or not, or
    out of that of ZeroSearch's wiki server, `[{"text": ...}]`. Raises what odd answers raise."""
    rows = answer["result"] if isinstance(answer, dict) else answer
    rows, n = ([rows], 1) if "query" in asked else (rows, len(asked["queries"]))
    if len(rows) != n or not all(isinstance(row, list) for row in rows):
        raise ValueError("not a list of documents for each query")
    found = [[row.get("document", row) for row in some] for some in rows]
    return [[(d["contents"] if "contents" in d else titled(d.get("title"), d["text"])).strip()
             for d in some] for some in found]  # fmt: skip


class WebSearch(Ranking):
    """Google's results through Serper: title and snippet. A noisy request gets what is left of the
    first page. Raises ServiceError."""

    def __init__(self, client: Client, top_k: int = 3, judge: Judge = holds_answer) -> None:
        super().__init__(top_k, judge, deepest=top_k)
        self.client = client

    def rank(self, queries: list[str], n: int) -> list[list[str] | None]:
        # A page of ten costs what one result does.
        asked = [{"q": query, "num": max(10, self.top_k)} for query in queries]
        return self.client.post("/search", asked, read_page)


def read_page(answer: dict, asked: dict) -> list[str]:
    """What Serper found. There may be no results, but what was asked is always repeated."""
    rows = answer["searchParameters"] and answer.get("organic") or []
    return [" ".join([row.get("title") or "", row.get("snippet") or ""]) for row in rows]


class Cached(Engine):
    """An engine whose replies are kept in the SQLite file `path`, so that none is paid for twice,
    by this process or another; `name` tells the engines of one file apart. Equal requests are asked
    once, failed ones not kept. Raises UserError for a file of no use."""

    def __init__(self, engine: Engine, path: str, name: str) -> None:
        self.engine, self.name = engine, name
        try:  # 60 seconds are what it waits while another process writes
            self.file = sqlite3.connect(path, timeout=60)
            self.file.execute("CREATE TABLE IF NOT EXISTS replies (request PRIMARY KEY, documents)")
            self.file.execute("SELECT request, documents FROM replies LIMIT 0")
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot be a cache: {error}; give another file.") from error

    def find(self, requests: list[SearchRequest]) -> list[list[str] | None]:
        keys = [self._key(request) for request in requests]
        new = dict(zip(keys, requests, strict=True))
        for some in parts([key for key in new if self._kept(key) is None], AT_ONCE):
            found = self.engine.find([new[key] for key in some])
            rows = [(key, json.dumps(reply)) for key, reply in zip(some, found, strict=True)
                    if reply is not None]  # fmt: skip
            with self.file:
                self.file.executemany("INSERT OR REPLACE INTO replies (request, documents) "
                                      "VALUES (?, ?)", rows)  # fmt: skip
        return [self._kept(key) for key in keys]

    def _kept(self, key: str) -> list[str] | None:
        found = self.file.execute("SELECT documents FROM replies WHERE request = ?", [key])
        return next((json.loads(text) for [text] in found), None)

    def _key(self, request: SearchRequest) -> str:
        # A noisy reply depends on what its question needs, any other on the query alone.
        needed = [request.question, request.answers] if request.noisy else None
        return json.dumps([self.name, self.engine.top_k, request.query, needed])
