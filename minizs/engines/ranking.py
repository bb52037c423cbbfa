"""The real search engines: what the policy meets at test time, and the simulator learns from.

An engine is any object with `search(requests: list[SearchRequest]) -> list[list[str]]`. A request
that is marked noisy gets the best-ranked documents that a judge finds useless to it: a real engine
can be as noisy as a simulated one. Other machines' are in client.py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import bm25s

from minizs import require
from minizs.engines.corpus import load_corpus
from minizs.trajectory import SearchRequest

Judge = Callable[[str, SearchRequest], bool]  # does this document hold what this request needs?
WORDS = {"token_pattern": r"\w+|[^\w\s]", "stopwords": [], "show_progress": False}


def holds_answer(document: str, request: SearchRequest) -> bool:
    """The judge for any data set: a document that contains a gold answer is what was needed."""
    return any(answer.lower() in document.lower() for answer in request.answers)


class Engine:
    """An engine that can fail: `find(requests)` gives None for what has failed for good."""

    failed = 0  # requests so far that were answered with nothing since they failed

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        """The documents for each request, best first, at most `top_k` of them, a line each."""
        found = self.find(requests)
        self.failed += found.count(None)
        return [documents or [] for documents in found]


class Ranking(Engine):
    """An engine whose method `rank(queries, n)` gives the `n` best documents for each query. What
    is taken out of a noisy reply is made up for from further down, as far as `deepest`."""

    def __init__(self, top_k: int, deepest: int, judge: Judge = holds_answer) -> None:
        self.top_k, self.deepest, self.judge = top_k, deepest, judge

    def find(self, requests: list[SearchRequest]) -> list[list[str] | None]:
        results: list[list[str] | None] = [None] * len(requests)
        short, depth = list(range(len(requests))), min(self.top_k, self.deepest)
        while short:
            found = self.rank([requests[i].query for i in short], depth)
            for i, ranked in zip(short, found, strict=True):
                texts = [" ".join(text.split()) for text in ranked or []]
                kept = [t for t in texts if not (requests[i].noisy and self.judge(t, requests[i]))]
                results[i] = None if ranked is None else kept[: self.top_k]
            short = [
                i
                for i in short
                if depth < self.deepest
                and requests[i].noisy
                and results[i] is not None
                and len(results[i]) < self.top_k
            ]
            depth = min(2 * depth, self.deepest)
        return results


class BM25(Ranking):
    """BM25 (Robertson and Zaragoza, 2009) with `bm25s`: words and marks in lower case, no stems."""

    def __init__(
        self,
        documents: Sequence,
        top_k: int = 3,
        judge: Judge = holds_answer,
        index: bm25s.BM25 | None = None,
    ) -> None:
        super().__init__(top_k, len(documents), judge)
        self.documents, self.index = documents, index or make_index(documents)

    @classmethod
    def of_corpus(cls, path: str | Path, top_k: int = 3) -> "BM25":
        """Over a file (`load_corpus`), mapped into memory with an index that is made once, in a
        folder beside it that has its size and time in its name. Raises UserError."""
        path = Path(path)
        require(path.is_file(), f"There is no corpus {str(path)!r}; check the path.")
        saved = Path(f"{path}.{path.stat().st_size}-{path.stat().st_mtime_ns}.bm25")
        if not saved.is_dir():
            documents = load_corpus(path)
            try:  # whole or not at all
                with TemporaryDirectory(dir=path.parent) as partial:
                    make_index(documents).save(f"{partial}/bm25", documents, show_progress=False)
                    Path(partial, "bm25").rename(saved)
            except OSError as error:  # no harm where another process has been faster
                require(saved.is_dir(), f"The index of {path} cannot be saved beside it: {error}")
        index = bm25s.BM25.load(saved, mmap=True, load_corpus=True)
        return cls(index.corpus, top_k, index=index)

    def rank(self, queries: list[str], n: int) -> list[list[str]]:
        return [[text for text, _ in found] for found in self.scored(queries, n)]

    def scored(self, queries: list[str], n: int) -> list[list[tuple[str, float]]]:
        """The `n` best documents (or all there are) for each query, with their scores."""
        words, n = bm25s.tokenize(queries, return_ids=False, **WORDS), min(n, len(self.documents))
        found = self.index.retrieve(words, self.documents, k=n, show_progress=False)
        return [
            [
                (text if isinstance(text, str) else text["text"], float(score))  # as it is saved
                for text, score in zip(*row, strict=True)
            ]
            for row in zip(*found, strict=True)
        ]


def make_index(documents: Sequence[str]) -> bm25s.BM25:
    index = bm25s.BM25()
    index.index(bm25s.tokenize(documents, **WORDS), show_progress=False)
    return index


class NoDocuments:
    """Answers every search with nothing: what a policy scores from memory alone."""

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        return [[] for _ in requests]
