"""The real search engines: what the policy meets at test time, and the simulator learns from.

An engine is any object with `search(requests: list[SearchRequest]) -> list[list[str]]`. A request
that is marked noisy gets the best-ranked documents that do *not* hold what it needs, so that a real
engine can be as noisy as a simulated one; what a request needs, a judge decides. Those that other
machines run are in remote.py.
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


class Ranking:
    """An engine whose method `rank(queries, n)` gives the `n` best documents for each query. What
    is taken out of a noisy reply is made up for from further down, as far as `deepest`."""

    def __init__(self, top_k: int, judge: Judge, deepest: int) -> None:
        self.top_k, self.judge, self.deepest = top_k, judge, deepest

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        """The documents for each request, best first, at most `top_k` of them, a line each."""
        results: list[list[str]] = [[] for _ in requests]
        short, depth = list(range(len(requests))), min(self.top_k, self.deepest)
        while short:
            found = self.rank([requests[i].query for i in short], depth)
            for i, ranked in zip(short, found, strict=True):
                texts, noisy = [" ".join(text.split()) for text in ranked], requests[i].noisy
                kept = [text for text in texts if not (noisy and self.judge(text, requests[i]))]
                results[i] = kept[: self.top_k]
            if depth == self.deepest:
                break
            short = [i for i in short if requests[i].noisy and len(results[i]) < self.top_k]
            depth = min(2 * depth, self.deepest)
        return results


class BM25(Ranking):
    """BM25 (Robertson and Zaragoza, 2009) with `bm25s`: words and marks in lower case, not stemmed.
    `index` is one of these documents that was made before."""

    def __init__(self, documents: Sequence[str], top_k: int = 3, judge: Judge = holds_answer,
                 index: bm25s.BM25 | None = None) -> None:  # fmt: skip
        super().__init__(top_k, judge, deepest=len(documents))
        self.documents, self.index = documents, index or make_index(documents)

    @classmethod
    def of_corpus(cls, path: str | Path, top_k: int = 3, judge: Judge = holds_answer) -> "BM25":
        """Over a file (`load_corpus`), its index kept beside it."""
        documents = load_corpus(path)
        return cls(documents, top_k, judge, saved_index(documents, Path(path)))

    def rank(self, queries: list[str], n: int) -> list[list[str]]:
        return [[text for text, _ in found] for found in self.scored(queries, n)]

    def scored(self, queries: list[str], n: int) -> list[list[tuple[str, float]]]:
        """The `n` best documents (or all there are) for each query, with their scores."""
        words, n = _words(queries, return_ids=False), min(n, len(self.documents))
        found = self.index.retrieve(words, k=n, show_progress=False)
        return [[(self.documents[int(i)], float(score)) for i, score in zip(*row, strict=True)]
                for row in zip(*found, strict=True)]  # fmt: skip


def _words(texts: Sequence[str], return_ids: bool):
    return bm25s.tokenize(texts, token_pattern=r"\w+|[^\w\s]", stopwords=[], show_progress=False,
                          return_ids=return_ids)  # fmt: skip


def make_index(documents: Sequence[str]) -> bm25s.BM25:
    index = bm25s.BM25()
    index.index(_words(documents, return_ids=True), show_progress=False)
    return index


def saved_index(documents: Sequence[str], path: Path) -> bm25s.BM25:
    """The index of this corpus file as it is now (its size and time), memory-mapped, in a folder
    beside it. It is made once and saved whole or not at all; older ones go. Raises UserError."""
    folder, file = Path(f"{path}.bm25"), path.stat()
    current = folder / f"{file.st_size}-{file.st_mtime_ns}"
    if not current.is_dir():
        try:
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as partial:
                make_index(documents).save(Path(partial, "index"))
                for old in set(folder.glob("[0-9]*-*")) - {current}:
                    rmtree(old)
                Path(partial, "index").rename(current)
        except OSError as error:  # no harm where another process has been faster
            require(current.is_dir(), f"The index of {path} cannot be saved beside it: {error}")
    return bm25s.BM25.load(current, mmap=True)


def titled(title: str | None, text: str) -> str:
    """A document as published corpora have it in `contents`: the title in quotes, a line break."""
    return f'"{title}"\n{text}' if title else text


def load_corpus(path: str | Path) -> Sequence[str]:
    """The documents of a file: the lines of a .txt; the rows of a .jsonl, .json or .parquet, in
    `contents`, or in `text` and perhaps `title`. They stay on the disk. Raises UserError."""
    require(Path(path).is_file(), f"There is no corpus {str(path)!r}; check the path.")
    kinds = ", ".join(data.READERS)
    require(Path(path).suffix in data.READERS, f"{path} is none of {kinds}; save it as one.")
    table = data.table(str(path))
    if table.column_names == ["text"]:
        table = table.filter(lambda line: bool(line.strip()), input_columns="text")
    require(len(table) > 0, f"The corpus {path} is empty.")
    columns, column = table.column_names, "contents" if "contents" in table.column_names else "text"
    require(column in columns, f"{path} has no column 'contents' or 'text'; it has {columns}.")
    if column == "text" and "title" in columns:
        table.set_transform(lambda r: {"text": list(map(titled, r["title"], r["text"]))})
    return table[column]


class NoDocuments:
    """Answers every search with nothing: what a policy scores from memory alone."""

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        return [[] for _ in requests]
