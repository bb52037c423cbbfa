"""Google's first page of results, by Serper (https://serper.dev), which asks for a key."""

from typing import Any

from minizs.engines.client import Call, Client
from minizs.engines.ranking import Ranking
from minizs.trajectory import SearchRequest

SERPER = "https://google.serper.dev"
PAGE = 10  # results: a page of ten costs what one result does


class WebSearch(Ranking):
    """Serper's results, a title and a snippet each. A noisy reply is what is left of the page
    without the useful results: another page would be paid for. Raises ServiceError."""

    def __init__(self, client: Client, top_k: int = 3) -> None:
        super().__init__(top_k, deepest=top_k)
        self.client = client

    def rank(self, requests: list[SearchRequest], n: int) -> list[list[str] | None]:
        size = max(PAGE, self.top_k)
        return self.client.send([page_call(request.query, size) for request in requests])


def page_call(query: str, size: int) -> Call:
    return Call("/search", read_page, lambda _: {"q": query, "num": size})


def read_page(answer: Any) -> list[str]:
    """The results on a page, if there are any. Raises what odd answers raise."""
    if not answer["searchParameters"]:  # which Serper repeats in every answer
        raise ValueError("not an answer of Serper's")
    documents = []
    for result in answer.get("organic") or []:
        documents.append(" ".join([result.get("title") or "", result.get("snippet") or ""]))
    return documents
