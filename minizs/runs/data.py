"""Questions with their gold answers, read as they are published: from the tiny world, files, or
the hub of data sets.

A column is told by its name, in any case. The question stands in `question`, WebQuestions'
`utterance` or KILT's `input`; the gold answers in the first of these that has some:

    golden_answers     FlashRAG, ZeroSearch
    answers            SQuAD 1.1 and 2.0, WebQuestions on the hub, plain lists
    answer             HotpotQA, 2WikiMultiHopQA, NQ-open, TriviaQA, Bamboogle, StrategyQA
    possible_answers   PopQA: a list, written as text
    reward_model       Search-R1: `ground_truth.target`
    targetvalue        WebQuestions' own files: `(list (description "..."))`
    output             KILT: a list of objects with an `answer`

Those of `answer_aliases` (MuSiQue) are golds as well. A `data_source` names the data set that a
question belongs to; without one it is the file's or the hub's name.
"""

import ast
import io
import json
import re
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from minizs import UserError, brief, require
from minizs.engines import files
from minizs.reward import normalize_answer
from minizs.trajectory import Example
from minizs.world.facts import embedded

PAPER = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
PAPER_REPOSITORY = "RUC-NLPIR/FlashRAG_datasets"
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?")
TEST_SPLITS = ("test", "validation", "dev", "train")  # the first of these that has golds
LONGEST = 2000  # characters; what is longer is a passage in the wrong column, and fills a context

QUESTION_COLUMNS = ("question", "utterance", "input")
GOLD_COLUMNS = (
    "golden_answers",
    "answers",
    "answer",
    "possible_answers",
    "reward_model",
    "targetvalue",
    "output",
)
ALIASES = "answer_aliases"
SOURCE = "data_source"
# Where golds stand inside an object: Search-R1, SQuAD, KILT, TriviaQA (its own files, the hub's).
GOLD_KEYS = (
    "ground_truth",
    "target",
    "text",
    "answer",
    "value",
    "aliases",
    "normalizedaliases",
    "normalized_aliases",
    "humananswers",
)
HIDDEN_GOLD = "<unk>"  # what TriviaQA's test questions have on the hub
DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()"]+))\)')  # WebQuestions


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
    tables = [_read_part(part, role) for part in check_spec(spec)]
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


@dataclass
class Table:
    """What was read from one file or hub name, and from where in it."""

    name: str
    default_source: str
    split: str = ""  # of the hub
    examples: list[Example] = field(default_factory=list)
    unanswerable: int = 0  # rows that the publisher marks so
    columns: dict[str, None] = field(default_factory=dict)  # all, as they are written there
    question_columns: dict[str, None] = field(default_factory=dict)  # those that were used
    gold_columns: dict[str, None] = field(default_factory=dict)
    named_sources: int = 0  # rows that say which data set they belong to

    def add(self, row: dict) -> None:
        """Read a row; one that is an article or a whole data set holds many."""
        self.columns.update(dict.fromkeys(map(str, row)))
        row = files.lower_names(row)
        inner_rows = _inner_rows(row)
        if inner_rows is not None:
            for inner_row in inner_rows:
                self.add(inner_row)
            return
        name = next((name for name in QUESTION_COLUMNS if name in row), "")
        question = row.get(name)
        golds, gold_columns = _row_golds(row)
        if _is_unanswerable(row):
            self.unanswerable += 1
            golds, gold_columns = [], [gold for gold in (*GOLD_COLUMNS, ALIASES) if gold in row]
        else:
            text = question.strip() if isinstance(question, str) else ""
            source = str(row.get(SOURCE) or self.default_source)
            self.examples.append(Example(text, distinct(golds), source))
        self.question_columns.update({name: None} if name else {})
        self.gold_columns.update(dict.fromkeys(gold_columns))
        self.named_sources += bool(row.get(SOURCE))

    def check_columns(self) -> None:
        """Raise UserError, with the columns there are and those that are needed."""
        names = {name.strip().lower() for name in self.columns}
        readable = names & set(QUESTION_COLUMNS) and names & set(GOLD_COLUMNS)
        require(
            bool(readable),
            f"{self.name} needs columns {_or(QUESTION_COLUMNS)} for the question and "
            f"{_or(GOLD_COLUMNS)} for the gold answers; it has "
            f"{', '.join(map(repr, self.columns)) or 'no rows'}. Rename them.",
        )

    def summary(self) -> str:
        """One sentence: what was taken as question, golds and source."""
        split = f" (split {self.split!r})" if self.split else ""
        source = f"source {self.default_source!r}, its name"
        if self.named_sources:
            source = f"source from {SOURCE!r}"
        if 0 < self.named_sources < len(self.examples) + self.unanswerable:
            source += f", or {self.default_source!r}, its name, where a row has none"
        return (
            f"{self.name}{split}: questions from {_and(self.question_columns)}, "
            f"golds from {_and(self.gold_columns)}, {source}."
        )


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def _and(names: Iterator[str]) -> str:
    return " and ".join(map(repr, names)) or "no column"


def _read_part(part: str, role: str) -> Table:
    """The examples of a file, or of the first suitable split of a hub name. Raises UserError."""
    path = Path(part)
    if path.is_file():
        table = Table(part, files.bare_name(path))
        for row in files.read_rows(path):
            table.add(row)
        table.check_columns()
        if files.file_format(path) in files.DELIMITERS:
            table.examples = _booleans_of_text(table.examples)
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


def _inner_rows(row: dict) -> list[dict] | None:
    """The rows inside a row: a file's `data` (SQuAD, TriviaQA), an article's or paragraph's
    questions (SQuAD); None where the row is a question itself."""
    if any(name in row for name in QUESTION_COLUMNS):
        return None  # MuSiQue's questions have `paragraphs`, too
    for name in ("data", "paragraphs", "qas"):
        inner = row.get(name)
        if isinstance(inner, list) and all(isinstance(part, dict) for part in inner):
            return inner
    return None


def _row_golds(row: dict) -> tuple[list[str], list[str]]:
    """The gold answers of a row, and the columns that they stand in."""
    for name in GOLD_COLUMNS:
        golds = _column_golds(name, row.get(name))
        if golds:
            aliases = _column_golds(ALIASES, row.get(ALIASES))
            return golds + aliases, [name, ALIASES] if aliases else [name]
    return [], []


def _column_golds(name: str, value: Any) -> list[str]:
    if name == "targetvalue" and isinstance(value, str):
        pairs = DESCRIPTION.findall(value)
        value = [re.sub(r"\\(.)", r"\1", quoted) or bare for quoted, bare in pairs]
    return golds_of(value)


def golds_of(value: Any) -> list[str]:
    """Every gold answer in a value, however deep: a text, a number, a list, an object, or a list
    of texts or an object that is written as text, as tables and PopQA have it."""
    if isinstance(value, str):
        parsed = parse_cell(value)
        if isinstance(parsed, dict) or _holds_text(parsed):
            value = parsed  # a list of numbers, as "[0, 1]", stays the text that it is
    if isinstance(value, dict):
        value = files.lower_names(value)
        return golds_of([value[key] for key in GOLD_KEYS if key in value])
    if isinstance(value, list | tuple):
        return [gold for part in value for gold in golds_of(part)]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if not isinstance(value, str | int | float) or value != value:  # NaN: a table's empty cell
        return []
    text = str(value)
    return [text] if normalize_answer(text) and text != HIDDEN_GOLD else []


def _holds_text(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(part, str | dict) for part in value)


def distinct(golds: list[str]) -> tuple[str, ...]:
    """The golds without those that normalise to the same as one before: they score nothing more."""
    by_meaning: dict[str, str] = {}
    for gold in golds:
        by_meaning.setdefault(normalize_answer(gold), gold)
    return tuple(by_meaning.values())


def _is_unanswerable(row: dict) -> bool:
    """Whether the publisher says that a question has no answer: MuSiQue, SQuAD 2.0."""
    marked = str(row.get("answerable", True)).lower() == "false"
    impossible = str(row.get("is_impossible", False)).lower() == "true"
    answers = row.get("answers")
    if isinstance(answers, str):
        answers = parse_cell(answers)
    no_text = isinstance(answers, dict) and files.lower_names(answers).get("text") == []
    return marked or impossible or no_text


def _booleans_of_text(examples: list[Example]) -> list[Example]:
    """Where a table's golds are true or false throughout, they are the booleans of StrategyQA."""
    yes_no = {"true": "yes", "false": "no"}
    golds = {gold.lower() for example in examples for gold in example.answers}
    if not golds or not golds <= yes_no.keys():
        return examples
    return [
        Example(e.question, tuple(yes_no[gold.lower()] for gold in e.answers), e.source)
        for e in examples
    ]


def parse_cell(text: str) -> Any:
    """A list or an object that is written as text, as JSON, Python or NumPy write it; any other
    text comes back as it is."""
    if text.strip()[:1] not in ("[", "{"):
        return text
    for parse in (json.loads, _parse_python):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, tokenize.TokenError):
            continue
    return text


def _parse_python(text: str) -> Any:
    """A literal of Python; also NumPy's `['a' 'b']`, which Python would read as one text, and its
    `array([...], dtype=object)`. Raises what bad literals raise."""
    words = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING and words and words[-1][:1] in ("'", '"'):
            words.append(",")
        if token.string.strip():
            words.append(token.string)
    return _literal(ast.parse(" ".join(words), mode="eval").body)


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and node.args:  # array(...)
        return _literal(node.args[0])
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(part) for part in node.elts]
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_literal, node.values), strict=True))
    return ast.literal_eval(node)


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` examples (0: all), the sources by turns: a file may hold one after the other."""
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    rounds = zip_longest(*by_source.values())
    in_turn = [example for one_each in rounds for example in one_each if example]
    return in_turn[: count or None]
