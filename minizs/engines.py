"""The real search engines: what the policy meets at test time, and the simulator learns from.

An engine is any object with `search(requests: list[SearchRequest]) -> list[list[str]]`. A request
that is marked noisy gets the best-ranked documents that do *not* hold what it needs, which a judge
decides: a real engine can be as noisy as a simulated one. Other machines' are in remote.py.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import rmtree

import bm25s

from minizs import data
from minizs.config import require
from minizs.trajectory import SearchRequest

Judge = Callable[[str, SearchRequest], bool]  # does this document hold what this request needs?


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

    def __init__(self, top_k: int, judge: Judge, deepest: int) -> None:
        self.top_k, self.judge, self.deepest = top_k, judge, deepest

    def find(self, requests: list[SearchRequest]) -> list[list[str] | None]:
        results: list[list[str] | None] = [None] * len(requests)
        short, depth = list(range(len(requests))), min(self.top_k, self.deepest)
        while short:
            found = self.rank([requests[i].query for i in short], depth)
            for i, ranked in zip(short, found, strict=True):
                results[i] = ranked and self.kept(ranked, requests[i])
            if depth == self.deepest:
                break
            short = [i for i in short if requests[i].noisy and results[i] is not None
                     and len(results[i]) < self.top_k]  # fmt: skip
            depth = min(2 * depth, self.deepest)
        return results

    def kept(self, ranked: list[str], request: SearchRequest) -> list[str]:
        texts = [" ".join(text.split()) for text in ranked]
        return [text for text in texts
                if not (request.noisy and self.judge(text, request))][: self.top_k]  # fmt: skip


class BM25(Ranking):
    """BM25 (Robertson and Zaragoza, 2009) with `bm25s`: words and marks in lower case, not stemmed.
    `index` is one of these documents that was made before."""

    def __init__(self, documents: Sequence, top_k: int = 3, judge: Judge = holds_answer,
                 index: bm25s.BM25 | None = None) -> None:  # fmt: skip
        super().__init__(top_k, judge, deepest=len(documents))
        self.documents, self.index = documents, index or make_index(documents)

    @classmethod
    def of_corpus(cls, path: str | Path, top_k: int = 3) -> "BM25":
        """Over a file (`load_corpus`), whose index is kept beside it."""
        index = saved_index(Path(path))
        documents, index.corpus = index.corpus, None  # else it would give documents, not places
        return cls(documents, top_k, index=index)

    def rank(self, queries: list[str], n: int) -> list[list[str]]:
        return [[text for text, _ in found] for found in self.scored(queries, n)]

    def scored(self, queries: list[str], n: int) -> list[list[tuple[str, float]]]:
        """The `n` best documents (or all there are) for each query, with their scores."""
        words, n = _words(queries, return_ids=False), min(n, len(self.documents))
        found = self.index.retrieve(words, k=n, show_progress=False)
        return [[(self.text(int(i)), float(score)) for i, score in zip(*row, strict=True)]
                for row in zip(*found, strict=True)]  # fmt: skip

    def text(self, i: int) -> str:
        document = self.documents[i]
        return document if isinstance(document, str) else document["text"]  # as `bm25s` saves it


def _words(texts: Sequence[str], return_ids: bool):
    return bm25s.tokenize(texts, token_pattern=r"\w+|[^\w\s]", stopwords=[], show_progress=False,
                          return_ids=return_ids)  # fmt: skip


def make_index(documents: Sequence[str]) -> bm25s.BM25:
    index = bm25s.BM25()
    index.index(_words(documents, return_ids=True), show_progress=False)
    return index


def saved_index(path: Path) -> bm25s.BM25:
    """The index of a corpus file as it is now (its size and time), with its documents, mapped into
    memory. It is made once, in a folder beside the file, whole or not at all. Raises UserError."""
    require(path.is_file(), f"There is no corpus {str(path)!r}; check the path.")
    folder, file = Path(f"{path}.bm25"), path.stat()
    current = folder / f"{file.st_size}-{file.st_mtime_ns}-texts"
    if not current.is_dir():
        documents = load_corpus(path)
        try:
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as partial:
                made = Path(partial, "index")
                make_index(documents).save(made, documents, show_progress=False)
                for old in set(folder.glob("[0-9]*-*")) - {current}:
                    rmtree(old)
                made.rename(current)
        except OSError as error:  # no harm where another process has been faster
            require(current.is_dir(), f"The index of {path} cannot be saved beside it: {error}")
    return bm25s.BM25.load(current, mmap=True, load_corpus=True)


def titled(title: str | None, text: str) -> str:
    """A document as published corpora have it in `contents`: the title in quotes, a line break."""
    return f'"{title}"\n' + text if title else text


def load_corpus(path: Path) -> list[str]:
    """The documents of a file (see `data.read`): its rows' `contents`, or `text` and perhaps
    `title`; rows without are left out. Raises UserError."""
    require(path.suffix in data.FILES, f"{path} is none of {', '.join(data.FILES)}: save it so.")
    rows = ((row, row.get("contents", row.get("text"))) for row in data.read(path))
    documents = [titled(None if "contents" in row else row.get("title"), text)
                 for row, text in rows if isinstance(text, str) and text.strip()]  # fmt: skip
    require(bool(documents), f"The corpus {path} has no text in a column 'contents' or 'text'.")
    return documents


class NoDocuments:
    """Answers every search with nothing: what a policy scores from memory alone."""

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        return [[] for _ in requests]
