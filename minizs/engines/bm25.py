"""BM25 (Robertson and Zaragoza, 2009) over a list of documents or a corpus file, with `bm25s`."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import bm25s

from minizs import require
from minizs.engines.corpus import load_corpus
from minizs.engines.ranking import Judge, Ranking, holds_answer
from minizs.trajectory import SearchRequest

# Words and punctuation marks in lower case. Words are not stemmed, and none is left out.
WORDS = {"token_pattern": r"\w+|[^\w\s]", "stopwords": [], "show_progress": False}


class BM25(Ranking):
    """Ranks documents by BM25. `index` is made from the documents where none is given."""

    def __init__(
        self,
        documents: Sequence,
        top_k: int = 3,
        judge: Judge = holds_answer,
        index: bm25s.BM25 | None = None,
    ) -> None:
        super().__init__(top_k, deepest=len(documents), judge=judge)
        self.documents = documents
        self.index = index or make_index(documents)

    @classmethod
    def of_corpus(cls, path: str | Path, top_k: int = 3) -> "BM25":
        """An engine over a corpus file (see `load_corpus`), mapped into memory.

        The index is made once, in a folder beside the file. The folder's name has the file's size
        and time, so that a changed corpus is indexed anew. Raises UserError."""
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

    def rank(self, requests: list[SearchRequest], n: int) -> list[list[str]]:
        rankings = self.scored([request.query for request in requests], n)
        return [[text for text, _ in ranking] for ranking in rankings]

    def scored(self, queries: list[str], n: int) -> list[list[tuple[str, float]]]:
        """The `n` best documents for each query (or all, if there are fewer), with their scores."""
        words = bm25s.tokenize(queries, return_ids=False, **WORDS)
        n = min(n, len(self.documents))
        results = self.index.retrieve(words, self.documents, k=n, show_progress=False)
        rankings = []
        for documents, scores in zip(results.documents, results.scores, strict=True):
            pairs = zip(map(text_of, documents), map(float, scores), strict=True)
            rankings.append(list(pairs))
        return rankings


def text_of(document: str | dict) -> str:
    """A document's text, whether it is one of a list or of a corpus as bm25s saves it."""
    return document if isinstance(document, str) else document["text"]


def make_index(documents: Sequence[str]) -> bm25s.BM25:
    index = bm25s.BM25()
    index.index(bm25s.tokenize(documents, **WORDS), show_progress=False)
    return index
