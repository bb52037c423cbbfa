"""Stage 1's data: what a real engine returned, each reply labelled useful or noisy.

Paper section 3.3. A row is a dictionary of `query`, `question`, `answers`, `documents` and `label`.
In tiny worlds scripted searchers ask BM25, and the world's judge is exact. On any other data a
policy or the plain searcher asks a real engine; a reply is useful if it holds a gold answer or, as
in the paper, if a language model says so.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

from minizs import require
from minizs.engines.bm25 import BM25
from minizs.engines.ranking import Judge, holds_answer
from minizs.reward import JUDGEMENTS, normalize_answer
from minizs.runs.run_folder import read_lines, write_lines
from minizs.trajectory import Example, SearchRequest, Trajectory
from minizs.world.facts import LARGE, World
from minizs.world.searchers import states_what_was_asked, write_requests

LABELS = ("useful", "noisy")
QUESTIONS = 64  # that are asked at a time, between two notes of what is done


def collect_from_worlds(
    worlds: int, size: int, seed: int, top_k: int = 3, split: str = "train", good: float = 0.75
) -> list[dict]:
    """`size` rows of re-drawn tiny worlds, as many useful as noisy; each also has its `hop`.

    `good` is the share of good queries. A reply that is useless only because its query was about
    the wrong thing is left out: from it a simulator would learn to state, as noise, the very fact
    that was asked for. A search that found nothing at all is left out, too.
    """
    rng = Random(f"collect {split} {seed}")
    rows = []
    for number in range(worlds):
        world = World(seed * 100_000 + 50_000 + number, split, **LARGE)
        questions = world.questions()[: 1 + 2 * size // worlds]
        hops = write_requests(world, questions, good, rng)
        replies = BM25(world.documents, top_k, world.judge).search(list(hops))
        for (request, hop), documents in zip(hops.items(), replies, strict=True):
            if not documents:
                continue
            row = make_row(request, documents, world.judge)
            if row["label"] == "useful" or not states_what_was_asked(row["query"], documents):
                rows.append({**row, "hop": hop})
    return [rows[index] for index in draw_balanced(rows, size, rng)]


class Collection:
    """The rows of a collection, which lie in a folder: `collected.jsonl`, and how far it has come.

    `trajectories.jsonl` holds a trajectory for each question that was asked, without tokens: the
    right answers among them are demonstrations for a warm start, which need no search any more.

    A batch of questions is written whole: its lines first, then the note that it is done. So a
    collection that was killed between the two asks that batch once more, and holds no row twice.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "collected.jsonl"
        self.trajectories = folder / "trajectories.jsonl"
        self.note = folder / "progress.json"
        self.rows: list[dict] = []
        self.questions = 0  # how many have been asked
        if self.note.is_file():
            progress = json.loads(self.note.read_text(encoding="utf-8"))
            self.questions = progress["questions"]
            self.rows = read_lines(self.file)[: progress["rows"]]
        self._replace(self.file, self.rows)
        if self.trajectories.is_file():
            self._replace(self.trajectories, read_lines(self.trajectories)[: self.questions])

    def add(self, rows: list[dict], trajectories: Sequence[Trajectory] = ()) -> None:
        """Add the rows of a batch of questions, and the trajectories that they come from."""
        self.rows += rows
        self.questions += len(trajectories)
        write_lines(self.file, rows)
        if trajectories:  # The tiny world's rows come from single searches.
            write_lines(self.trajectories, [without_tokens(row) for row in trajectories])
        self._replace(self.note, [{"questions": self.questions, "rows": len(self.rows)}])

    def counts(self) -> dict[str, int]:
        """How many rows each label has."""
        return {label: sum(row["label"] == label for row in self.rows) for label in LABELS}

    def finish(self) -> None:
        """Drop the note: the collection is whole."""
        self.note.unlink(missing_ok=True)

    @staticmethod
    def _replace(path: Path, rows: list[dict]) -> None:
        """Write a file at once or not at all."""
        partial = path.with_suffix(".partial")
        write_lines(partial, rows, "w")
        partial.replace(path)


def collect_from_searches(
    play: Callable[..., list[Trajectory]],
    examples: Sequence[Example],
    size: int,
    collection: Collection,
    judge=None,
    batch: int = QUESTIONS,
) -> None:
    """Add the rows of all searches that found something to a collection, until half of `size` are
    useful and half noisy, or until no question is left.

    `play(examples, keys=...)` searches for an answer to each example. Its keys are the places in
    `examples`, so that a collection that broke off gets the rows of an unbroken one. `judge` is a
    `Judge`, whose word is a row's label; without one the gold answers decide. Raises UserError at
    the end if all rows have one label.
    """
    for start in range(collection.questions, len(examples), batch):
        if min(collection.counts().values()) >= size // 2:
            break
        questions = examples[start : start + batch]
        keys = [(start + place,) for place in range(len(questions))]
        trajectories = play(questions, keys=keys)
        rows = [row for trajectory in trajectories for row in rows_of(trajectory)]
        if judge:
            rows = judge_rows(rows, judge)
        else:
            rows = [row for row in rows if can_be_found(row["answers"])]
        collection.add(rows, trajectories)
    counts = collection.counts()
    advice = "give more questions or another searcher"
    if counts["noisy"] == 0:
        advice = "give more questions, or --engine_noise 0.5 for noisy replies"
    require(
        min(counts.values()) > 0,
        f"To learn from, both useful and noisy replies are needed; there are {counts}: {advice}. "
        f"The rows are in {collection.file}.",
    )


def without_tokens(trajectory: Trajectory) -> dict:
    """A trajectory as a line of a file of demonstrations, whose tokens are made anew."""
    return {
        "example": asdict(trajectory.example),
        "turns": [asdict(turn) for turn in trajectory.turns],
    }


def can_be_found(answers: Sequence[str]) -> bool:
    """Whether a document can hold one of these gold answers. None holds "yes" or "no": by the golds
    all replies to such a question would be noisy, those that settle it too."""
    return any(normalize_answer(answer) not in JUDGEMENTS | {""} for answer in answers)


def rows_of(trajectory: Trajectory) -> list[dict]:
    """A row for each search of a trajectory that found documents; the gold answers label it."""
    example = trajectory.example
    rows = []
    for turn in trajectory.turns:
        if turn.action == "search" and turn.documents:
            request = SearchRequest(turn.content, example.question, example.answers)
            rows.append(make_row(request, turn.documents, holds_answer))
    return rows


def make_row(request: SearchRequest, documents: list[str], judge: Judge) -> dict:
    """A row, which is useful if one of its documents is."""
    useful = any(judge(document, request) for document in documents)
    return {
        "query": request.query,
        "question": request.question,
        "answers": list(request.answers),
        "documents": documents,
        "label": "useful" if useful else "noisy",
    }


def judge_rows(rows: list[dict], judge) -> list[dict]:
    """The rows, labelled by the word of a language model; a word other than "useful" means noisy.

    Raises UserError if no word is one of the two: it would be paid for and mean nothing.
    """
    words = judge.verdicts([(request_of(row), row["documents"]) for row in rows])
    others = [word for word in words if word not in LABELS]
    print(f"The judge: {len(others)} of {len(words)} words are neither useful nor noisy.")
    require(
        len(others) < len(words) or not words,
        "The judge says neither useful nor noisy, but words as "
        f"{others[:1]}; see --simulator_api, or give another --judge.",
    )
    return [
        {**row, "label": "useful" if word == "useful" else "noisy"}
        for row, word in zip(rows, words, strict=True)
    ]


def request_of(row: dict, key: tuple[int, ...] = ()) -> SearchRequest:
    """The request that a simulator gets for a row: the row's label is the word it is asked with."""
    return SearchRequest(
        row["query"],
        row["question"],
        tuple(row["answers"]),
        noisy=row["label"] == "noisy",
        key=key,
    )


def draw_balanced(rows: Sequence[dict], size: int, rng: Random) -> list[int]:
    """Places of at most `size` rows, as many useful as noisy, drawn and mixed at random."""
    places = {label: [] for label in LABELS}
    for place, row in enumerate(rows):
        if row["label"] in places:
            places[row["label"]].append(place)
    half = min(size // 2, *map(len, places.values()))
    drawn = [place for label in LABELS for place in rng.sample(places[label], half)]
    rng.shuffle(drawn)
    return drawn
