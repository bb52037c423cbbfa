"""Real questions and passages in the sizes of a small run: a split, and short documents.

    python benchmarks/real_data.py --questions A.jsonl B.jsonl --corpus C.jsonl --output runs/real

Of each file of questions the last fifth goes to OUTPUT/test.jsonl and the rest to
OUTPUT/train.jsonl. Where a file is in the order of its articles, questions about the same passage
are on the same side, but for those at the border.

The passages are cut at ends of sentences into documents of about `--words` words, each with its
passage's title. A passage that stands in two files is taken once. What a document costs is paid
for each token of it: the simulator writes it and the policy reads it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minizs.engines.corpus import load_corpus
from minizs.imitation.plain_searcher import SENTENCE_END
from minizs.runs import data
from minizs.runs.flags import run_script

HELD_OUT = 0.2  # of each file


def read_questions(path: Path) -> list[dict]:
    """The questions of a file in any layout that `--data` reads, in its order."""
    return [
        {
            "question": example.question,
            "golden_answers": list(example.answers),
            "data_source": example.source,
        }
        for example in data.read_part(str(path), "test").examples
    ]


def split_by_place(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(to train on, to test with): the last fifth of a file is for the test."""
    count = len(rows) - round(HELD_OUT * len(rows))
    return rows[:count], rows[count:]


def short_documents(passage: str, words: int) -> list[dict]:
    """A passage as documents of about so many words. A line in quotes before it is its title."""
    title, is_titled, text = passage.partition("\n")
    if not (is_titled and title.startswith('"') and title.endswith('"')):
        title, text = "", passage
    return [{"title": title.strip('"'), "text": piece} for piece in pieces(text, words)]


def pieces(text: str, words: int) -> Iterator[str]:
    """A passage in pieces of whole sentences, each with `words` words or fewer; a longer sentence
    is a piece of its own."""
    piece: list[str] = []
    for sentence in SENTENCE_END.split(text):
        length = sum(len(part.split()) for part in [*piece, sentence])
        if piece and length > words:
            yield " ".join(piece)
            piece = []
        piece.append(sentence)
    if piece:
        yield " ".join(piece)


def write_rows(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows):,} rows in {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--questions", nargs="+", type=Path, required=True, help="Files that --data reads."
    )
    parser.add_argument(
        "--corpus", nargs="+", type=Path, required=True, help="Files that --corpus reads."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/real"), help="The folder.")
    parser.add_argument("--words", type=int, default=60, help="The words of a document, at most.")
    options = parser.parse_args(argv)
    data.check_spec(",".join(map(str, options.questions)))
    train: list[dict] = []
    test: list[dict] = []
    for path in options.questions:
        for_training, for_test = split_by_place(read_questions(path))
        train += for_training
        test += for_test
    passages = []
    for path in options.corpus:
        passages += load_corpus(path)
    documents = []
    for passage in dict.fromkeys(passages):  # two samples can hold the same one
        documents += short_documents(passage, options.words)
    options.output.mkdir(parents=True, exist_ok=True)
    write_rows(options.output / "train.jsonl", train)
    write_rows(options.output / "test.jsonl", test)
    write_rows(options.output / "corpus.jsonl", documents)


if __name__ == "__main__":
    run_script(main)
