"""Questions with their gold answers: the tiny world's, those of files, or the hub's.

What is published is read as it is, see layouts.py and engines/files.py.
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from minizs import UserError, brief, require
from minizs.engines import files
from minizs.reward import normalize_answer
from minizs.runs.layouts import Table, booleans_of_text
from minizs.trajectory import Example
from minizs.world.facts import embedded

PAPER = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
PAPER_REPOSITORY = "RUC-NLPIR/FlashRAG_datasets"
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?")
TEST_SPLITS = ("test", "validation", "dev", "train")  # the first of these that has golds
LONGEST = 2000  # characters; what is longer is a passage in the wrong column, and fills a context


def split_spec(spec: str) -> list[str]:
    """The names in a spec with commas between; a file may have commas in its name, too."""
    pieces = spec.split(",")
    names = []
    while pieces:
        count = len(pieces)
        while count > 1 and not Path(",".join(pieces[:count]).strip()).is_file():
            count -= 1
        names.append(",".join(pieces[:count]).strip())
        pieces = pieces[count:]
    return names


def looks_like_a_file(name: str) -> bool:
    """Whether a name in a spec is that of a file, by its ending: it need not be there."""
    return bool(files.file_format(Path(name)))


def check_spec(spec: str) -> list[str]:
    """The parts of a spec: files, hub names (`org/name:config`) and the paper's sets, of which
    "paper" means all; or ["world"]. Raises UserError. The hub is not asked yet."""
    parts = []
    for name in split_spec(spec):
        parts += PAPER if name == "paper" else [name]
    for part in parts:
        require(
            spec == "world" or _can_be_read(part),
            f"--data {part!r} is neither 'world', a file ({', '.join(files.FORMATS)}, or one of "
            f"these with {files.COMPRESSED}) that is there, nor a hub name such as org/name; check "
            "the path.",
        )
    return parts


def _can_be_read(part: str) -> bool:
    is_file = Path(part).is_file()
    if looks_like_a_file(part):
        return is_file
    is_hub_name = part in PAPER or HUB_NAME.fullmatch(part) is not None
    return is_hub_name and not is_file


def load_examples(spec: str, role: str, say: Callable[[str], None] = print) -> list[Example]:
    """The examples of a spec (see `check_spec`) for "train", "dev" or "test". Raises UserError.

    The tiny world has a world for each role. Of a file, or of the hub's split "train", a tenth of
    the questions, told by their hash, is "dev" and the rest "train"; "test" is all of a file. What
    was read from which column, and what was left out, is said once: not again for "dev", whose
    rows are those of "train".
    """
    if spec == "world":
        return [Example(q.text, (q.answer,), q.kind) for q in embedded(role).questions()]
    tables = [read_part(part, role) for part in check_spec(spec)]
    examples, left_out = _select([e for table in tables for e in table.examples])
    left_out["unanswerable"] = sum(table.unanswerable for table in tables)
    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    require(bool(examples), f"{spec} has no row with both a question and an answer ({counts}).")
    if role != "dev":
        for table in tables:
            say(table.summary())
        if counts:
            say(f"{len(examples)} questions of {spec} are kept; left out: {counts}.")
    if role == "test":
        return examples
    chosen = [example for example in examples if is_held_out(example) == (role == "dev")]
    require(bool(chosen) or role == "dev", f"All questions of {spec} are held out; give it more.")
    return chosen


def is_held_out(example: Example) -> bool:
    """Whether a question belongs to the tenth that is never trained on."""
    return zlib.crc32(example.question.encode()) % 10 == 0


def _select(examples: list[Example]) -> tuple[list[Example], Counter]:
    """The examples that can be trained on, each once, and how many are not, by the reason."""
    selected: dict[tuple[str, str], Example] = {}
    left_out: Counter = Counter()
    for example in examples:
        key = (normalize_answer(example.question), example.source)
        if not example.question or not example.answers:
            left_out["without question or answer"] += 1
        elif len(example.question) > LONGEST:
            left_out["over-long"] += 1
        elif key in selected:
            left_out["repeated"] += 1
        else:
            selected[key] = example
    return list(selected.values()), left_out


def read_part(part: str, role: str) -> Table:
    """The examples of a file, or of the first suitable split of a hub name. Raises UserError."""
    path = Path(part)
    if path.is_file():
        table = Table(part, files.bare_name(path))
        for row in files.read_rows(path):
            table.add(row)
        table.check_columns()
        if files.file_format(path) in files.DELIMITERS:
            table.examples = booleans_of_text(table.examples)
        return table
    for split, rows in _hub_splits(part, role):
        table = Table(part, part.rpartition("/")[2], split)
        for row in rows:
            table.add(row)
        if any(example.answers for example in table.examples):
            break  # else its golds are not published, as those of many a test
    table.check_columns()
    return table


def part_rows(part: str) -> Iterator[dict]:
    """The rows of a file, or of a hub name's training split, as they stand. Raises UserError."""
    if Path(part).is_file():
        yield from files.read_rows(Path(part))
        return
    for _, rows in _hub_splits(part, "train"):
        yield from rows


def _hub_splits(part: str, role: str) -> list[tuple[str, Any]]:
    """(name, rows) of the splits of a hub name that suit a role. Raises UserError."""
    import datasets

    name = f"{PAPER_REPOSITORY}:{part}" if part in PAPER else part
    repository, config = HUB_NAME.fullmatch(name).groups()
    try:
        splits = datasets.load_dataset(repository, config)
    except Exception as error:  # the library raises its own kinds for every format
        raise UserError(f"{part} cannot be read: {brief(error.__cause__ or error)}") from error
    suitable = TEST_SPLITS if role == "test" else ("train",)
    present = [(split, splits[split]) for split in suitable if split in splits]
    require(bool(present), f"{part} has no split {role!r}; it has {', '.join(splits)}.")
    return present


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` examples (0: all), the sources by turns: a file may hold one after the other."""
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    rounds = zip_longest(*by_source.values())
    in_turn = [example for one_each in rounds for example in one_each if example]
    return in_turn[: count or None]
