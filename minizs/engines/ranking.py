"""What real search engines share: replies that can fail, and replies that are noisy on purpose.

An engine is any object with `search(requests: list[SearchRequest]) -> list[list[str]]`. Most rank
documents: such an engine is a subclass of `Ranking` with one method, `rank`. A request that is
marked noisy then gets the best-ranked documents that do not hold what it needs, so that a real
engine can be as noisy as a simulated one."""

from collections.abc import Callable

from minizs.reward import JUDGEMENTS, normalize_answer
from minizs.trajectory import SearchRequest

Judge = Callable[[str, SearchRequest], bool]  # does this document hold what this request needs?


def holds_answer(document: str, request: SearchRequest) -> bool:
    """The judge for any data set: whether a gold answer stands in the document as whole words, both
    normalised as in the reward. Yes and no are judgements, which no document holds."""
    text = f" {normalize_answer(document)} "
    golds = {normalize_answer(answer) for answer in request.answers} - JUDGEMENTS - {""}
    return any(f" {gold} " in text for gold in golds)


class Engine:
    """An engine that can fail. Its method `find(requests)` gives a list of documents for each
    request, or None for a request that has failed for good."""

    failed = 0  # requests so far that have failed and were answered with nothing

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        """The documents for each request, best first, at most `top_k` of them, a line each."""
        replies = self.find(requests)
        self.failed += replies.count(None)
        return [documents or [] for documents in replies]


class Ranking(Engine):
    """An engine that ranks documents: `rank(requests, n)` gives the `n` best for each request.

    Useful documents are removed from a noisy reply, and the next-best ones take their place. To
    find these, up to `deepest` documents are asked for. An engine that draws random numbers makes
    them from `self.seed` and `request.key` (see randomness.py): its replies are then the same
    whoever else searches, and after a resume."""

    def __init__(
        self, top_k: int, deepest: int, judge: Judge = holds_answer, seed: int = 0
    ) -> None:
        self.top_k = top_k
        self.deepest = deepest
        self.judge = judge
        self.seed = seed

    def find(self, requests: list[SearchRequest]) -> list[list[str] | None]:
        replies: list[list[str] | None] = [None] * len(requests)
        pending = list(range(len(requests)))
        depth = min(self.top_k, self.deepest)
        while pending:
            rankings = self.rank([requests[i] for i in pending], depth)
            short = []
            for i, ranking in zip(pending, rankings, strict=True):
                replies[i] = None if ranking is None else self._reply(ranking, requests[i])
                # Where the ranking has ended, a deeper one holds nothing else.
                if ranking and len(ranking) >= depth and len(replies[i]) < self.top_k:
                    short.append(i)
            pending = short if depth < self.deepest else []
            depth = min(2 * depth, self.deepest)
        return replies

    def _reply(self, ranking: list[str], request: SearchRequest) -> list[str]:
        """What is shown of a ranking: at most `top_k` documents, none of them useful if noisy."""
        documents = [" ".join(text.split()) for text in ranking]
        if request.noisy:
            documents = [text for text in documents if not self.judge(text, request)]
        return documents[: self.top_k]


class NoDocuments:
    """Answers every search with nothing: what a policy scores from memory alone."""

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        return [[] for _ in requests]
