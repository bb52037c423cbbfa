"""Questions with their gold answers: the tiny world's, local files' or the hub's. The golds are in
`golden_answers` (FlashRAG, ZeroSearch), `reward_model.ground_truth.target` (Search-R1), `answer`
(HotpotQA, NQ-open) or `answers`."""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from minizs import UserError, brief, require
from minizs.randomness import hash64
from minizs.reward import normalize_answer
from minizs.trajectory import Example
from minizs.world.facts import embedded

PAPER = "nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle".split()  # its seven sets
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?")
FILES = (".json", ".jsonl", ".parquet", ".txt")
GOLDS = ("golden_answers", "answers", "answer", "reward_model")
LONGEST = 2000  # characters; what is longer is a passage in the wrong column, and fills a context


def check(spec: str) -> list[str]:
    """The files and hub names (`org/name:config`, those of `PAPER`, or "paper" for all of these) of
    a spec with commas between; or ["world"]. Raises UserError; the hub is not asked."""
    names = [spec] if Path(spec).is_file() else map(str.strip, spec.split(","))
    parts = [part for name in names for part in (PAPER if name == "paper" else [name])]
    for part in parts:
        path, named = Path(part), part in PAPER or spec == "world" or HUB_NAME.fullmatch(part)
        there = path.is_file() if path.suffix in FILES else named and not path.is_file()
        require(
            bool(there),
            f"--data {part!r} is neither 'world', a {', '.join(FILES)} file that "
            "is there, nor a hub name such as org/name; check the path.",
        )
    return parts


def load(spec: str, role: str, say: Callable[[str], None] = print) -> list[Example]:
    """The examples of a spec for "train", "dev" or "test" (a world each). Of a file, or the hub's
    "train", a tenth, told by its hash, is "dev", the rest "train"; "test" is all. Or UserError."""
    if spec == "world":
        return [Example(q.text, (q.answer,), q.kind) for q in embedded(role).questions()]
    kept, left_out = {}, Counter()
    for example in (example for part in check(spec) for example in _examples(part, role)):
        key = normalize_answer(example.question), example.source
        if not example.question or not example.answers:
            left_out["without question or answer"] += 1
        elif len(example.question) > LONGEST:
            left_out["over-long"] += 1
        elif kept.setdefault(key, example) is not example:
            left_out["repeated"] += 1
    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    require(bool(kept), f"{spec} has no row with both a question and an answer ({counts}).")
    if left_out and role != "dev":  # whose rows are those of "train"
        say(f"{len(kept)} questions of {spec} are kept; left out: {counts}.")
    chosen = [
        e
        for e in kept.values()
        if role == "test" or (zlib.crc32(e.question.encode()) % 10 == 0) == (role == "dev")
    ]
    require(bool(chosen) or role == "dev", f"All questions of {spec} are held out; give it more.")
    return chosen


def _examples(part: str, role: str) -> Iterator[Example]:
    """Every row of a file or hub name, with the golds of its first column that has some."""
    path, columns = Path(part), {}
    source = path.stem if path.is_file() else part.rpartition("/")[2]
    for row in rows(part, role):
        columns |= row
        golds = next(filter(None, (_golds(row.get(name)) for name in GOLDS)), [])
        text = row["question"].strip() if isinstance(row.get("question"), str) else ""
        yield Example(text, tuple(dict.fromkeys(golds)), str(row.get("data_source") or source))
    require(
        "question" in columns and not columns.keys().isdisjoint(GOLDS),
        f"{part} needs columns 'question' and one of {GOLDS}; it has {list(columns) or 'no rows'}.",
    )


def _golds(value) -> list[str]:
    """All golds of a column, whether it is a text, a number, a list, or a `reward_model`."""
    if isinstance(value, dict):
        return _golds(value.get("ground_truth") or value.get("target"))
    golds = value if isinstance(value, list) else [value]
    return [str(g) for g in golds if isinstance(g, str | int | float) and normalize_answer(str(g))]


def rows(part: str, role: str = "train") -> Iterator[dict]:
    """The rows of one file or hub name. Raises UserError."""
    if Path(part).is_file():
        return (yield from read(Path(part)))
    import datasets

    try:
        whole = f"RUC-NLPIR/FlashRAG_datasets:{part}" if part in PAPER else part
        splits = datasets.load_dataset(*HUB_NAME.fullmatch(whole).groups())
    except Exception as error:  # the library raises its own kinds for every format
        raise UserError(f"{part} cannot be read: {brief(error.__cause__ or error)}") from error
    wanted = ["test", "validation", "dev", "train"] if role == "test" else ["train"]
    found = [split for split in wanted if split in splits]
    require(bool(found), f"{part} has no split {role!r}; it has {', '.join(splits)}.")
    yield from splits[found[0]]


def read(path: Path) -> Iterator[dict]:
    """The rows of a file as they stand (`datasets` would make timestamps of some texts): the lines
    of a .txt, as `text`; of JSON a list's objects, or one a line. Raises UserError."""
    number = 0
    try:
        for number, row in enumerate(_parsed(path), 1):
            require(isinstance(row, dict), f"{path} cannot be read: row {number} is no object.")
            yield row
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: JSON without end in depth
        raise UserError(f"{path} cannot be read near row {number + 1}: {brief(error)}") from error


def _parsed(path: Path) -> Iterator:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for some in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from some.to_pylist()
        return
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix == ".txt":
            yield from ({"text": line.rstrip("\n")} for line in file if line.strip())
        elif (first := file.read(1)) == "[":
            yield from _json(first + file.read())
        else:
            file.seek(0)
            yield from map(_json, filter(str.strip, file))


def _json(text: str):
    """Half a character (a lone surrogate), which JSON can spell and no tokenizer takes, is "?"."""
    if "\\ud" in text.lower():
        text = json.dumps(json.loads(text), ensure_ascii=False).encode(errors="replace")
    return json.loads(text)


def spread(examples: Sequence[Example], n: int) -> list[Example]:
    """`n` examples (0: all), a source each by turns: a file may hold its sources one by one."""
    names = dict.fromkeys(example.source for example in examples)
    turns = zip_longest(*([e for e in examples if e.source == name] for name in names))
    return [example for turn in turns for example in turn if example][: n or None]


def batch(examples: Sequence[Example], step: int, size: int, seed: int) -> list[int]:
    """The indices that a step (from 1) trains on, a function of the seed: a resumed run needs no
    cursor. Every epoch is a fresh permutation; batches run across its end."""
    n, first = len(examples), (step - 1) * size
    epochs = range(first // n, (first + size - 1) // n + 1)
    order = [i for epoch in epochs for i in sorted(range(n), key=lambda i: hash64(seed, epoch, i))]
    return order[first % n : first % n + size]
