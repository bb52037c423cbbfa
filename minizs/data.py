"""Questions with their gold answers: the tiny world's, local files' or the hub's.

Which columns hold them is told by their names: ZeroSearch, Search-R1 and FlashRAG (`golden_answers`
or `reward_model.ground_truth.target`), HotpotQA and NQ-open (`answer`, a text or a list), TriviaQA
(`answer.value` and `.aliases`), SQuAD (`answers.text`) and plain `question` and `answers`.
"""

import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from minizs.config import UserError, brief, require
from minizs.randomness import hash64
from minizs.reward import normalize_answer
from minizs.trajectory import Example
from minizs.world import embedded

PAPER = "nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle".split()  # its seven sets
PAPER_HUB = "RUC-NLPIR/FlashRAG_datasets"  # where each of them is a configuration
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?(?:@([\w./-]+))?")
FILES = (".json", ".jsonl", ".parquet", ".txt")
SPLITS = {"train": ["train"], "dev": ["train"], "test": ["test", "validation", "dev", "train"]}
GOLDS = ("golden_answers", "answers", "answer", "reward_model")
NESTED = ("value", "aliases", "text", "ground_truth", "target")  # where in a column golds can be
LONGEST = 2000  # characters; what is longer is a passage in the wrong column, and fills a context


def check(spec: str) -> list[str]:
    """The files and hub names of a spec, which has commas between them; ["world"] for the world.
    Raises UserError if `load` could not even begin to read one. The hub is not asked."""
    names = [spec] if Path(spec).is_file() else map(str.strip, spec.split(","))
    parts = [part for name in names for part in (PAPER if name == "paper" else [name])]
    for part in parts:
        path, hub = Path(part), part in PAPER or spec == "world" or HUB_NAME.fullmatch(part)
        known = path.is_file() if path.suffix in FILES else hub and not path.is_file()
        require(bool(known), f"--data {part!r} is neither 'world' nor a {', '.join(FILES)} file "
                "that is there nor a hub name such as org/name; check the path.")  # fmt: skip
    return parts


def load(spec: str, role: str, say: Callable[[str], None] = print) -> list[Example]:
    """The examples of "world", or of files and hub names with commas between. Raises UserError.

    A hub name is `org/name`, `:config` and `@revision` at will, or one of `PAPER`; "paper" is all
    of these. Each `role` ("train", "dev", "test") has its own world. Of a file, or the hub's split
    "train", about one question in ten, told by its hash, is "dev" (there may be none), the rest
    "train"; "test" is every row, from the hub those of the split that comes nearest to a test.
    `say` is told how many questions were left out: empty, over-long and repeated ones."""
    if spec == "world":
        return [Example(q.text, (q.answer,), q.kind) for q in embedded(role).questions()]
    kept: dict[tuple[str, str], Example] = {}
    left_out = Counter()
    for example in (e for part in check(spec) for e in _examples(part, role, say)):
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
    chosen = [e for e in kept.values() if role == "test"
              or (zlib.crc32(e.question.encode()) % 10 == 0) == (role == "dev")]  # fmt: skip
    require(bool(chosen) or role == "dev", f"All questions of {spec} are held out; give it more.")
    return chosen


def _examples(part: str, role: str, say: Callable[[str], None]) -> Iterator[Example]:
    """Every row of a file or hub name, with the golds of its first column that has some."""
    path, there = Path(part), {}
    source = path.stem if path.is_file() else part.partition("@")[0].rpartition("/")[2]
    for row in rows(part, role, say):
        there |= row
        found = ([*filter(normalize_answer, _golds(row.get(name)))] for name in GOLDS)
        golds = tuple(dict.fromkeys(next(filter(None, found), [])))
        text = row["question"].strip() if isinstance(row.get("question"), str) else ""
        yield Example(text, golds, str(row.get("data_source") or source))
    for names in (("question",), GOLDS):
        missing = f"no column {' or '.join(map(repr, names))}; it has {list(there) or 'no rows'}."
        require(not there.keys().isdisjoint(names), f"{part} has {missing}")


def _golds(value: Any) -> list[str]:
    """All texts of a gold, whether it is one text, a list, or a mapping (see NESTED) of these."""
    if isinstance(value, dict):
        value = [value.get(name) for name in NESTED]
    if isinstance(value, list):
        return [gold for one in value for gold in _golds(one)]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps is often one of floats
    return [] if value is None or value != value else [str(value)]


def rows(part: str, role: str = "train", say: Callable[[str], None] = print) -> Iterator[dict]:
    """The rows of one file or hub name. Raises UserError."""
    if Path(part).is_file():
        return (yield from read(Path(part)))
    import datasets

    datasets.disable_progress_bars()
    name = f"{PAPER_HUB}:{part}" if part in PAPER else part
    try:
        name, config, revision = HUB_NAME.fullmatch(name).groups()
        splits = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # the library raises its own kinds for every format
        raise UserError(f"{part} cannot be read: {brief(error.__cause__ or error)}") from error
    found = [split for split in SPLITS[role] if split in splits]
    require(bool(found), f"{part} has no split {role!r}; it has {', '.join(splits)}.")
    if role == "test" and found == ["train"]:
        say(f"{part} has no split to test on; its 'train' is taken.")
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


def _parsed(path: Path) -> Iterator[Any]:
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


def _json(text: str) -> Any:
    """Half a character (a lone surrogate), which JSON can spell and no tokenizer takes, is "?"."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    return value


def spread(examples: Sequence[Example], n: int) -> list[Example]:
    """`n` examples (0: all), a source each by turns: a file may hold its sources one by one."""
    sources = defaultdict(list)
    for example in examples:
        sources[example.source].append(example)
    turns = zip_longest(*sources.values())
    return [example for turn in turns for example in turn if example][: n or None]


def batch(examples: Sequence[Example], step: int, size: int, seed: int) -> list[int]:
    """The indices that step `step` (from 1) trains on, as a function of the seed alone: a resumed
    run needs no cursor. Every epoch is a fresh permutation; batches run across its end."""
    n, first = len(examples), (step - 1) * size
    places = [divmod(place, n) for place in range(first, first + size)]  # (epoch, place in it)
    orders = {epoch: sorted(range(n), key=lambda i, epoch=epoch: hash64(seed, epoch, i))
              for epoch in {epoch for epoch, _ in places}}  # fmt: skip
    return [orders[epoch][place] for epoch, place in places]
