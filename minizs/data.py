"""Questions with their gold answers: the tiny world's, or those of a local file.

Left out for now: hub names and the nested layouts of the published search data sets.
"""

import zlib
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from minizs.config import UserError, require
from minizs.randomness import hash64
from minizs.trajectory import Example

QUESTION, ANSWERS, SOURCE = ("question",), ("golden_answers", "answers", "answer"), ("data_source",)
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def check(spec: str) -> None:
    """Raise UserError if `load` could not even begin to read this."""
    if spec == "world":
        return
    path = Path(spec)
    if path.suffix not in READERS:
        raise UserError(f"--data {spec!r} is neither 'world' nor a .json, .jsonl or .parquet file.")
    require(path.is_file(), f"There is no data file {spec!r}; check the path.")


def load(spec: str, role: str) -> list[Example]:
    """The examples of "world" or of a file. Raises UserError.

    `role`: "train", "dev" or "test", each another world. A file is split: about one question in
    ten, told by its hash, is "dev" (there may be none), the rest "train"; "test" is every row.
    """
    if spec == "world":
        from minizs.world import embedded

        return embedded(role).examples()
    check(spec)
    import datasets

    datasets.disable_progress_bars()
    kind = READERS[Path(spec).suffix]
    try:
        table = datasets.load_dataset(kind, data_files=spec, split="train")
    except Exception as error:  # the library raises its own kinds for every format
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"{spec} cannot be read as {kind}: {cause}") from error
    question, answers = _column(table, QUESTION, spec), _column(table, ANSWERS, spec)
    named = next((name for name in SOURCE if name in table.column_names), None)
    examples = []
    for row in table:
        golds = row[answers] if isinstance(row[answers], list) else [row[answers]]
        golds = tuple(str(gold) for gold in golds if gold is not None and str(gold).strip())
        if row[question] and golds:
            source = str(row[named]) if named else Path(spec).stem
            examples.append(Example(str(row[question]), golds, source))
    require(bool(examples), f"{spec} has no row with both a question and an answer.")
    if role == "test":
        return examples
    chosen = [e for e in examples if (zlib.crc32(e.question.encode()) % 10 == 0) == (role == "dev")]
    require(bool(chosen) or role == "dev", f"All questions of {spec} are held out; give it more.")
    return chosen


def spread(examples: Sequence[Example], n: int) -> list[Example]:
    """`n` examples (0: all), a source each by turns: a file may hold its sources one by one."""
    sources: dict[str, list[Example]] = {}
    for example in examples:
        sources.setdefault(example.source, []).append(example)
    turns = zip_longest(*sources.values())
    return [example for turn in turns for example in turn if example][: n or None]


def _column(table, names: Sequence[str], spec: str) -> str:
    found = next((name for name in names if name in table.column_names), None)
    if found is None:
        wanted, there = " or ".join(map(repr, names)), ", ".join(map(repr, table.column_names))
        raise UserError(f"{spec} has no column {wanted}; it has {there}.")
    return found


def batch(examples: Sequence[Example], step: int, size: int, seed: int) -> list[int]:
    """The indices that step `step` (from 1) trains on, as a function of the seed alone.

    Every epoch is a fresh permutation, and batches run across its end, so that each question is
    seen equally often and a resumed run needs no cursor.
    """
    n = len(examples)
    first = (step - 1) * size
    epochs = {place // n for place in range(first, first + size)}
    orders = {e: sorted(range(n), key=lambda i, e=e: hash64(seed, e, i)) for e in epochs}
    return [orders[place // n][place % n] for place in range(first, first + size)]
