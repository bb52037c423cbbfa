"""Real questions and passages for a small run: how they are split and cut."""

import json

import pytest

from benchmarks import real_data
from minizs import UserError
from minizs.engines.corpus import load_corpus
from minizs.runs import data


def test_the_last_fifth_is_for_the_test():
    """Neighbours in a file are often about one passage: they stay together but for one border."""
    rows = [{"question": str(number)} for number in range(12)]
    assert real_data.split_by_place(rows) == (rows[:10], rows[10:])


def test_pieces_are_whole_sentences():
    """Nothing is lost; a piece has as many words as it may, and a longer sentence is one alone."""
    text = "One two three. Four five! Six? A sentence that is too long by itself. End."
    pieces = list(real_data.pieces(text, 5))
    assert pieces == [
        "One two three. Four five!",
        "Six?",
        "A sentence that is too long by itself.",
        "End.",
    ]
    assert list(real_data.pieces(text, 100)) == [text]


def test_the_files_are_read_by_the_scripts(tmp_path):
    """Both questions and documents, from several files of several formats; a passage that two of
    them hold counts once."""
    for name in ("a", "b"):
        rows = [{"question": f"{name}{i}?", "answer": "x", "data_source": name} for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.txt").write_text("First. Second.\nThird.")
    (tmp_path / "e.json").write_text(json.dumps({"T": ["Fourth word.", " Fifth."], "U": "Sixth."}))
    (tmp_path / "d.jsonl").write_text(json.dumps({"title": "T", "text": "Fourth word. Fifth."}))
    questions = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    corpus = [str(tmp_path / "c.txt"), str(tmp_path / "d.jsonl"), str(tmp_path / "e.json")]
    output = tmp_path / "out"
    flags = ["--words", "2", "--output", str(output)]
    real_data.main(["--questions", *questions, "--corpus", *corpus, *flags])
    test = data.load_examples(str(output / "test.jsonl"), "test")
    assert [(example.question, example.source) for example in test] == [("a4?", "a"), ("b4?", "b")]
    assert len((output / "train.jsonl").read_text().splitlines()) == 8
    assert load_corpus(output / "corpus.jsonl") == [
        "First. Second.",
        "Third.",
        '"T"\nFourth word.',
        '"T"\nFifth.',
        '"U"\nSixth.',
    ]


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="a.jsonl.*check the path"):
        real_data.main(["--questions", str(tmp_path / "a.jsonl"), "--corpus", "c.jsonl"])
