"""Files of rows, in the formats that data sets and corpora are published in: one reader for both.

    .jsonl    an object a line
    .json     a list of objects, an object a line, or one object
    .parquet  a table
    .csv      a table with its columns' names in the first line; .tsv has tabs for commas
    .txt      a text a line, as the column `text`

Each of them can be compressed: `nq.jsonl.gz`.
"""

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from minizs import UserError, brief, require

FORMATS = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt")
COMPRESSED = ".gz"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_CELL = 2**31 - 1  # characters; the module's own limit is 131,072, less than a long page
COLUMNS_SHOWN = 30
# What the libraries raise for a broken file; RuntimeError: JSON that is nested without end.
UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, csv.Error, zlib.error)


def file_format(path: Path) -> str:
    """`.jsonl` for `nq.jsonl` and for `nq.jsonl.gz`; "" for a format that cannot be read."""
    suffix = Path(path.name.lower().removesuffix(COMPRESSED)).suffix
    return suffix if suffix in FORMATS else ""


def bare_name(path: Path) -> str:
    """`nq` for `nq.jsonl` and for `nq.jsonl.gz`."""
    compressed = path.suffix.lower() == COMPRESSED
    return Path(path.stem).stem if compressed else path.stem


def lower_names(row: dict) -> dict[str, Any]:
    """A row whose columns have their names in lower case: publishers write `Question`, too."""
    return {str(name).strip().lower(): value for name, value in row.items()}


def column_names(columns: Iterable[str]) -> str:
    """The columns of a file for a sentence. An object whose keys are ids has thousands."""
    names = list(map(repr, columns))
    more = f" and {len(names) - COLUMNS_SHOWN} more" if len(names) > COLUMNS_SHOWN else ""
    return ", ".join(names[:COLUMNS_SHOWN]) + more or "no rows"


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a file as they stand, one by one. Raises UserError, which names the bad row.

    `datasets` is not used here: it makes timestamps of some texts, and a copy of every file.
    """
    number = 0
    try:
        for number, row in enumerate(_parsed(path), 1):
            require(isinstance(row, dict), f"{path} cannot be read: row {number} is no object.")
            yield row
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read near row {number + 1}: {brief(error)}") from error


def _parsed(path: Path) -> Iterator:
    """What stands in a file, not yet checked to be rows."""
    kind = file_format(path)
    newline = "" if kind in DELIMITERS else None  # a cell can hold line breaks of its own
    with gzip.open(path) if path.suffix.lower() == COMPRESSED else path.open("rb") as raw:
        if kind == ".parquet":
            yield from _parquet_rows(raw)
            return
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline)
        if kind in DELIMITERS:
            yield from _table_rows(text, DELIMITERS[kind])
        elif kind == ".txt":
            yield from ({"text": line.rstrip("\n")} for line in text if line.strip())
        else:
            yield from _json_values(text, kind)


def _parquet_rows(raw: IO[bytes]) -> Iterator[dict]:
    import pyarrow.parquet

    seekable = raw if not isinstance(raw, gzip.GzipFile) else io.BytesIO(raw.read())
    for batch in pyarrow.parquet.ParquetFile(seekable).iter_batches(1000):
        yield from batch.to_pylist()


def _table_rows(text: IO[str], delimiter: str) -> Iterator[dict]:
    """The rows of a .csv or .tsv. Raises ValueError for a row that has more cells than columns.

    Many a .tsv quotes no cell, and has quotation marks of its own. Where they do not fit the rules
    of quoting, they are ordinary characters from that row on.
    """
    csv.field_size_limit(LONGEST_CELL)
    rows = 0
    try:
        for row in _whole_rows(csv.DictReader(text, delimiter=delimiter, strict=True)):
            yield row
            rows += 1
    except csv.Error:
        if delimiter != DELIMITERS[".tsv"]:
            raise
        text.seek(0)
        plain = csv.DictReader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        yield from _whole_rows(itertools.islice(plain, rows, None))


def _whole_rows(rows: Iterable[dict]) -> Iterator[dict]:
    for row in rows:
        if None in row:
            raise ValueError("this row has more cells than there are columns")
        yield row


def _json_values(text: IO[str], kind: str) -> Iterator:
    """The items of one list, a value a line, or (.json alone) one object over many lines."""
    first = text.readline()
    while first and not first.strip():
        first = text.readline()
    if first.lstrip().startswith("[") or (kind == ".json" and first and not _is_json(first)):
        whole = _parse_json(first + text.read())
        yield from whole if isinstance(whole, list) else [whole]
        return
    for line in itertools.chain([first], text):
        if line.strip():
            yield _parse_json(line)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _parse_json(text: str) -> Any:
    """Half a character (a lone surrogate), which JSON can spell and no tokenizer takes, is "?"."""
    if "\\ud" in text.lower():
        text = json.dumps(json.loads(text), ensure_ascii=False).encode(errors="replace")
    return json.loads(text)
