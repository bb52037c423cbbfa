"""Corpora, in the layouts that they are published in.

wiki-18 (FlashRAG, Search-R1)   contents: "Title" in quotes, a line break, and the text
DPR's passages                  text, title
KILT's knowledge source         text: paragraphs, as texts or objects; wikipedia_title
SQuAD's articles                data: paragraphs, each with a context; the article's title
an object of pages              each title with its text, or with a list of its sentences
lines of a .txt file            a document each
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minizs import require
from minizs.engines import files

PASSAGE_WORDS = 100  # about what a passage of wiki-18 has
HEADING, BULLET = "Section::::", "BULLET::::-"  # KILT's marks at the beginning of a paragraph


def load_corpus(path: Path) -> list[str]:
    """The documents of a file (see files.py); rows without text are left out. Raises UserError."""
    formats = ", ".join(files.FORMATS)
    require(bool(files.file_format(path)), f"{path} is none of {formats}: save it as one of these.")
    columns: dict[str, None] = {}
    documents = []
    rows = 0
    for row in files.read_rows(path):
        columns.update(dict.fromkeys(row))
        documents += row_documents(files.lower_names(row))
        rows += 1
    if not documents and rows == 1 and files.file_format(path) == ".json":
        documents = documents_by_title(row)
    require(
        bool(documents),
        f"The corpus {path} has no text in a column 'contents' or 'text' (perhaps with 'title'); "
        f"it has {files.column_names(columns)}.",
    )
    return documents


def row_documents(row: dict) -> list[str]:
    """The documents of a row: one, or the passages of a page, or none."""
    if "contents" in row:
        return text_documents(row["contents"], title=None)
    if is_list_of_objects(row.get("data")) or is_list_of_objects(row.get("paragraphs")):
        return squad_documents(row)
    title = row.get("title") or row.get("wikipedia_title")
    text = row.get("text")
    if isinstance(text, dict):  # the hub's layout of KILT
        text = text.get("paragraph")
    if isinstance(text, list):
        paragraphs = [paragraph_text(part).strip() for part in text]
        return [titled(title, passage) for passage in passages(title, paragraphs)]
    return text_documents(text, title)


def paragraph_text(paragraph: str | dict | list) -> str:
    """A paragraph's text. It can be an object of it or a list of its sentences; else it is ""."""
    if isinstance(paragraph, dict):
        paragraph = paragraph.get("paragraph")
    if isinstance(paragraph, list):
        paragraph = "".join(part for part in paragraph if isinstance(part, str))
    return paragraph if isinstance(paragraph, str) else ""


def squad_documents(row: dict) -> list[str]:
    """A document for each paragraph of an article, or of the articles of a whole file."""
    documents = []
    if is_list_of_objects(row.get("data")):
        for article in row["data"]:
            documents += squad_documents(files.lower_names(article))
        return documents
    title = row.get("title")
    if isinstance(title, str):
        title = title.replace("_", " ")  # as in an address; BM25 would take it for one word
    if is_list_of_objects(row.get("paragraphs")):
        for paragraph in row["paragraphs"]:
            documents += text_documents(paragraph.get("context"), title)
    return documents


def is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


def documents_by_title(pages: dict) -> list[str]:
    """The documents of one object that is the whole file: a title and its text or sentences each.
    There are none where a value is anything else, since the object is a row of columns then."""
    documents = []
    for title, page in pages.items():
        sentences = page if isinstance(page, list) else [page]
        if not all(isinstance(sentence, str) for sentence in sentences):
            return []
        text = " ".join(sentence.strip() for sentence in sentences)
        documents += text_documents(text, title)
    return documents


def text_documents(text: str | None, title: str | None) -> list[str]:
    has_text = isinstance(text, str) and bool(text.strip())
    return [titled(title, text)] if has_text else []


def titled(title: str | None, text: str) -> str:
    """A document as published corpora have it in `contents`: the title in quotes, a line break."""
    return f'"{title}"\n{text}' if title else text


def passages(title: str | None, paragraphs: list[str]) -> Iterator[str]:
    """Whole paragraphs of a page, joined until they have `PASSAGE_WORDS`; its headings are left
    out, and so is its first paragraph where that is only the title."""
    passage: list[str] = []
    for number, paragraph in enumerate(paragraphs):
        is_title = number == 0 and paragraph == title
        if not paragraph or is_title or paragraph.startswith(HEADING):
            continue
        passage.append(paragraph.removeprefix(BULLET).strip())
        if sum(len(part.split()) for part in passage) >= PASSAGE_WORDS:
            yield " ".join(passage)
            passage = []
    if passage:
        yield " ".join(passage)
