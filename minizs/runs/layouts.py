"""The layouts that data sets are published in: which columns hold the question and its golds.

A column is told by its name, in any case. The question stands in `question`, WebQuestions'
`utterance` or KILT's `input`; the gold answers in the first of these that has some:

    golden_answers     FlashRAG, ZeroSearch
    answers            SQuAD 1.1 and 2.0, WebQuestions on the hub, plain lists
    answer             HotpotQA, 2WikiMultiHopQA, NQ-open, TriviaQA, Bamboogle, StrategyQA
    answerkey          ARC, CommonsenseQA: the letter of a choice
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any

from minizs import require
from minizs.engines import files
from minizs.reward import normalize_answer
from minizs.trajectory import Example

QUESTION_COLUMNS = ("question", "utterance", "input")
GOLD_COLUMNS = (
    "golden_answers",
    "answers",
    "answer",
    "answerkey",
    "possible_answers",
    "reward_model",
    "targetvalue",
    "output",
)
ALIASES = "answer_aliases"
SOURCE = "data_source"
OPTION_COLUMNS = ("choices", "options")  # of multiple choice; see `Table.summary`
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
        """Read a row: a question, or an article or a whole data set, which holds many."""
        self.columns.update(dict.fromkeys(map(str, row)))
        row = files.lower_names(row)
        inner_rows = _inner_rows(row)
        if inner_rows is None:
            self._add_question(row)
            return
        for inner_row in inner_rows:
            self.add(inner_row)

    def _add_question(self, row: dict) -> None:
        golds, gold_columns = _row_golds(row)
        self.gold_columns.update(dict.fromkeys(gold_columns))
        name = next((name for name in QUESTION_COLUMNS if name in row), None)
        if name:
            self.question_columns[name] = None
        self.named_sources += bool(row.get(SOURCE))
        if _is_unanswerable(row):
            self.unanswerable += 1
            return
        question = row.get(name)
        text = question.strip() if isinstance(question, str) else ""
        source = str(row.get(SOURCE) or self.default_source)
        self.examples.append(Example(text, distinct(golds), source))

    def check_columns(self) -> None:
        """Raise UserError, with the columns there are and those that are needed."""
        names = {name.strip().lower() for name in self.columns}
        require(bool(names), f"{self.name} has no rows.")
        readable = names & set(QUESTION_COLUMNS) and names & set(GOLD_COLUMNS)
        require(
            bool(readable),
            f"{self.name} needs columns for the question ({_or(QUESTION_COLUMNS)}) and for the "
            f"gold answers ({_or(GOLD_COLUMNS)}); it has {files.column_names(self.columns)}. "
            "Rename them.",
        )

    def summary(self) -> str:
        """One sentence: what was taken as question, golds and source."""
        split = f" (split {self.split!r})" if self.split else ""
        source = f"source {self.default_source!r}, its name"
        if self.named_sources:
            source = f"source from {SOURCE!r}"
        if 0 < self.named_sources < len(self.examples) + self.unanswerable:
            source += f", or {self.default_source!r}, its name, where a row has none"
        sentence = (
            f"{self.name}{split}: questions from {_and(self.question_columns)}, "
            f"golds from {_and(self.gold_columns)}, {source}."
        )
        options = [name for name in self.columns if name.strip().lower() in OPTION_COLUMNS]
        if options:
            sentence += f" {_and(options)} is not read: options have to stand in the question."
        return sentence


def _or(names: Sequence[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}"


def _and(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names)) or "no column"


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
    if isinstance(value, date):
        value = value.isoformat()
    if not isinstance(value, str | int | float | Decimal) or value != value:  # NaN: an empty cell
        return []
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with a gap in it: 1990 has become 1990.0
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


def booleans_of_text(examples: list[Example]) -> list[Example]:
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
    if isinstance(node, ast.Name) and node.id in ("nan", "null"):
        return None
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_literal, node.values), strict=True))
    return ast.literal_eval(node)
