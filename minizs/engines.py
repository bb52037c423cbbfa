"""The real search engines: what the policy meets at test time, and the simulator learns from.

An engine is any object with `search(requests: list[SearchRequest]) -> list[list[str]]`. A request
that is marked noisy gets the best-ranked documents that do *not* hold what it needs, so that a real
engine can be as noisy as a simulated one; what a request needs, a judge decides.
"""

from collections.abc import Callable

from minizs.trajectory import SearchRequest

Judge = Callable[[str, SearchRequest], bool]  # does this document hold what this request needs?


def holds_answer(document: str, request: SearchRequest) -> bool:
    """The judge for any data set: a document that contains a gold answer is what was needed."""
    return any(answer.lower() in document.lower() for answer in request.answers)


class BM25:
    """The best `top_k` documents by BM25 (Robertson and Zaragoza, 2009), with `bm25s`."""

    def __init__(self, documents: list[str], top_k: int = 3, judge: Judge = holds_answer) -> None:
        import bm25s

        self.documents, self.top_k, self.judge = documents, top_k, judge
        self.index = bm25s.BM25()
        self.index.index([_words(text) for text in documents], show_progress=False)

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        """The documents for each request, best first, at most `top_k` of them."""
        results: list[list[str]] = [[] for _ in requests]
        short, depth = list(range(len(requests))), min(self.top_k, len(self.documents))
        while short:
            queries = [_words(requests[i].query) for i in short]
            rows, _ = self.index.retrieve(queries, k=depth, show_progress=False)
            for i, row in zip(short, rows, strict=True):
                ranked, noisy = [self.documents[j] for j in row], requests[i].noisy
                kept = [text for text in ranked if not (noisy and self.judge(text, requests[i]))]
                results[i] = kept[: self.top_k]
            if depth == len(self.documents):
                break
            # What was taken out of a noisy reply is made up for from further down.
            short = [i for i in short if len(results[i]) < self.top_k]
            depth = min(2 * depth, len(self.documents))
        return results


def _words(text: str) -> list[str]:
    return text.lower().replace("?", " ").split()


class NoDocuments:
    """Answers every search with nothing: what a policy scores from memory alone."""

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        return [[] for _ in requests]
