"""A retriever on another machine: Search-R1's server, ZeroSearch's, or our own (retriever.py)."""

from typing import Any

from minizs.engines.client import Call, Client
from minizs.engines.corpus import titled
from minizs.engines.ranking import Ranking
from minizs.trajectory import SearchRequest

AT_ONCE = 8  # queries in one request to a retriever, which fail together


class HttpSearch(Ranking):
    """A retriever behind POST /retrieve. Search-R1's protocol takes many queries at a time;
    ZeroSearch's, spoken where `wiki` is True, takes one. Raises ServiceError."""

    def __init__(self, client: Client, top_k: int = 3, wiki: bool = False) -> None:
        super().__init__(top_k, deepest=16 * top_k)
        self.client = client
        self.wiki = wiki

    def rank(self, requests: list[SearchRequest], n: int) -> list[list[str] | None]:
        queries = [request.query for request in requests]
        if self.wiki:
            return self.client.send([wiki_call(query, n) for query in queries])
        parts = [queries[i : i + AT_ONCE] for i in range(0, len(queries), AT_ONCE)]
        replies = self.client.send([search_r1_call(part, n) for part in parts])
        rankings: list[list[str] | None] = []
        for part, reply in zip(parts, replies, strict=True):
            rankings += reply or [None] * len(part)
        return rankings


def search_r1_call(queries: list[str], n: int) -> Call:
    """Search-R1's protocol: a list of rows for each query, with scores or without."""

    def read(answer: Any) -> list[list[str]]:
        rankings = answer["result"] if isinstance(answer, dict) else answer
        if len(rankings) != len(queries):
            raise ValueError("not a list of documents for each query")
        return [read_documents(rows) for rows in rankings]

    body = {"queries": queries, "topk": n, "return_scores": True}
    return Call("/retrieve", read, lambda _: body)


def wiki_call(query: str, n: int) -> Call:
    """The protocol of ZeroSearch's wiki server: the rows for one query."""
    return Call("/retrieve", read_documents, lambda _: {"query": query, "top_k": n})


def read_documents(rows: Any) -> list[str]:
    """The documents in a list of rows. A row is a document or holds one beside its score; a
    document is its `contents`, or its `title` and `text`. Raises what odd rows raise."""
    if not isinstance(rows, list):
        raise ValueError("not a list of documents")
    documents = []
    for row in rows:
        document = row.get("document", row)
        if "contents" in document:
            text = document["contents"]
        else:
            text = titled(document.get("title"), document["text"])
        documents.append(text.strip())
    return documents
