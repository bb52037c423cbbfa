"""BM25 (Robertson and Zaragoza, 2009) over a list of documents or a corpus file, with `bm25s`."""

import os
import unicodedata
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import bm25s

from minizs import require
from minizs.engines.corpus import load_corpus
from minizs.engines.ranking import Judge, Ranking, holds_answer
from minizs.reward import fold
from minizs.trajectory import SearchRequest

# Accents and vowel signs that are characters of their own, as in Hindi and Arabic, are parts of
# words, although Python's \w has letters and digits alone.
MARKS = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M")
# Words and punctuation marks of a folded text (see `reward.fold`), which is in lower case and in
# one spelling of Unicode; in scripts without spaces a character is a word. Words are not stemmed,
# and none is left out.
WORDS = {
    "token_pattern": rf"[\w{MARKS}]+|[^\w\s{MARKS}]",
    "stopwords": [],
    "show_progress": False,
}


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
        """An engine over a corpus file (see `load_corpus`). Its index is made once, and mapped into
        memory (see `index_folders`). Raises UserError for a file that is no corpus."""
        path = Path(path)
        require(path.is_file(), f"There is no corpus {str(path)!r}; check the path.")
        folders = index_folders(path)
        saved = next((folder for folder in folders if folder.is_dir()), None)
        if saved is None:
            documents = load_corpus(path)
            index = make_index(documents)
            saved = save_index(index, documents, path, folders)
            if saved is None:
                return cls(documents, top_k, index=index)
        index = bm25s.BM25.load(saved, mmap=True, load_corpus=True)
        return cls(index.corpus, top_k, index=index)

    def rank(self, requests: list[SearchRequest], n: int) -> list[list[str]]:
        rankings = self.scored([request.query for request in requests], n)
        return [[text for text, _ in ranking] for ranking in rankings]

    def scored(self, queries: list[str], n: int) -> list[list[tuple[str, float]]]:
        """The `n` best documents for each query, with their scores. Documents that share no word
        with the query, whose score is 0, are left out."""
        words = bm25s.tokenize(list(map(fold, queries)), return_ids=False, **WORDS)
        n = min(n, len(self.documents))
        results = self.index.retrieve(words, self.documents, k=n, show_progress=False)
        rankings = []
        for documents, scores in zip(results.documents, results.scores, strict=True):
            pairs = zip(map(text_of, documents), map(float, scores), strict=True)
            rankings.append([(text, score) for text, score in pairs if score > 0])
        return rankings


def text_of(document: str | dict) -> str:
    """A document's text, whether it is one of a list or of a corpus as bm25s saves it."""
    return document if isinstance(document, str) else document["text"]


def make_index(documents: Sequence[str]) -> bm25s.BM25:
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(map(fold, documents)), **WORDS), show_progress=False)
    return index


# ---- Where the index of a corpus is kept ---------------------------------------------------------


def index_folders(path: Path) -> list[Path]:
    """Where the index of a corpus may be: in a folder beside the file, or, if that cannot be made,
    in the user's cache folder. The names have the size and the time of the file, so that a
    changed corpus is indexed anew."""
    name = f"{path.name}.{path.stat().st_size}-{path.stat().st_mtime_ns}.words.bm25"
    whole_path = zlib.crc32(str(path.resolve()).encode())
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [path.with_name(name), Path(cache, "minizs", f"{whole_path:08x}-{name}")]


def save_index(
    index: bm25s.BM25, documents: list[str], path: Path, folders: list[Path]
) -> Path | None:
    """Save an index in the first of these folders that can be made, whole or not at all, and say so
    if that is not the first one. None, and a note, if there is none."""
    for folder in folders:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder.parent) as partial:
                index.save(f"{partial}/bm25", documents, show_progress=False)
                Path(partial, "bm25").rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been faster
                continue
        if folder != folders[0]:
            note(f"{path.parent} cannot be written to: the index of {path} is kept in {folder}.")
        return folder
    note(f"The index of {path} can be saved nowhere: it is kept in memory, and made in each run.")
    return None


def note(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)
