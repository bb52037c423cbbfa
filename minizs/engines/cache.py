"""Replies that are kept in a file, so that no search is paid for twice."""

import json
import sqlite3

from minizs import UserError
from minizs.engines.ranking import Engine
from minizs.trajectory import SearchRequest

BETWEEN_WRITES = 32  # queries: what an interrupted run may have paid for in vain
LOCK_SECONDS = 60  # how long to wait while another process writes


class Cached(Engine):
    """An engine whose replies, failures apart, are kept in the SQLite file `path`. `name` tells the
    engines of one file apart. Raises UserError for a file that cannot be used."""

    def __init__(self, engine: Engine, path: str, name: str) -> None:
        self.engine = engine
        self.name = name
        try:
            self.file = sqlite3.connect(path, timeout=LOCK_SECONDS)
            self.file.execute("CREATE TABLE IF NOT EXISTS replies (request PRIMARY KEY, documents)")
            rows = self.file.execute("SELECT request, documents FROM replies")
            self.replies: dict[str, str] = dict(rows)
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot be a cache: {error}; give another file.") from error

    def find(self, requests: list[SearchRequest]) -> list[list[str] | None]:
        names = [self._name(request) for request in requests]
        missing = {}
        for name, request in zip(names, requests, strict=True):
            if name not in self.replies:
                missing[name] = request
        for start in range(0, len(missing), BETWEEN_WRITES):
            self._fetch(dict(list(missing.items())[start : start + BETWEEN_WRITES]))
        return [json.loads(self.replies.get(name, "null")) for name in names]

    def _name(self, request: SearchRequest) -> str:
        """What a reply depends on: the engine and the query. A noisy reply depends on what its
        question needs as well."""
        need = [request.question, request.answers] if request.noisy else None
        return json.dumps([self.name, self.engine.top_k, request.query, need])

    def _fetch(self, missing: dict[str, SearchRequest]) -> None:
        """Ask the engine, and write down all replies that have not failed."""
        replies = self.engine.find(list(missing.values()))
        rows = {}
        for name, documents in zip(missing, replies, strict=True):
            if documents is not None:
                rows[name] = json.dumps(documents)
        self.replies.update(rows)
        with self.file:
            self.file.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", rows.items())
