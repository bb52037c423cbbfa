"""The real search engines."""

import json
import os
import re
from shutil import rmtree
from unittest import mock

import datasets
import numpy as np
import pytest

from minizs import UserError
from minizs.engines import ranking
from minizs.engines.corpus import load_corpus
from minizs.engines.ranking import BM25, NoDocuments, holds_answer
from minizs.randomness import uniform
from minizs.trajectory import SearchRequest

DOCUMENTS = [
    "Ann was born in Rome",
    "Ann works for Acme",
    "Ann likes cats",
    "Ann owns a boat",
    "Bob was born in Oslo",
    "Bob works for Acme",
    "Bob likes dogs",
    "Rome lies in Italy",
    "Oslo lies in Norway",
    "Cid was born in Rome",
]


def ask(query, noisy=False, answers=("Rome",)):
    return SearchRequest(query, "where was Ann born?", answers, noisy)


def test_the_best_documents_come_first():
    """Guards ranking, top_k, and replies in another order than the requests."""
    engine = BM25(DOCUMENTS, top_k=2)
    found = engine.search([ask("where was ann BORN?"), ask("Oslo lies in")])
    assert [len(documents) for documents in found] == [2, 2]
    assert found[0][0] == DOCUMENTS[0] and found[1][0] == DOCUMENTS[8]
    assert engine.search([]) == []
    assert len(BM25(DOCUMENTS[:2], top_k=5).search([ask("Ann")])[0]) == 2


@pytest.mark.parametrize("query", ["?", "zzz", "", "\n"])
def test_queries_of_no_known_word(query):
    """Guards a training run that ends with a policy's first odd query."""
    assert len(BM25(DOCUMENTS, top_k=3).search([ask(query), ask("Ann")])) == 2


def test_noise_takes_the_useful_documents_out():
    """Guards noise that leaves the answer in, spoils the other requests, or is off topic."""
    engine = BM25(DOCUMENTS, top_k=2)
    clean, noisy = engine.search([ask("Ann born in"), ask("Ann born in", noisy=True)])
    assert clean[0] == DOCUMENTS[0] and clean == engine.search([ask("Ann born in")])[0]
    assert len(noisy) == 2 and not any("Rome" in text for text in noisy)
    assert any("Ann" in text for text in noisy)  # still the best-ranked of the rest


def test_noise_goes_as_deep_as_it_takes():
    """Guards noisy replies that are short, or empty, where the best documents are all useful."""
    engine = BM25([f"Ann was born in Rome {i}" for i in range(30)] + ["Ann likes cats"], top_k=2)
    clean, noisy = engine.search([ask("Ann born in Rome"), ask("Ann born in Rome", noisy=True)])
    assert (len(clean), noisy) == (2, ["Ann likes cats"])


def test_the_share_of_noisy_requests_is_what_was_asked_for():
    """Guards noise that is drawn elsewhere than by the request's own mark."""
    engine, p = BM25(DOCUMENTS, top_k=2), 0.3
    requests = [ask("Ann born in", uniform(0, i) < p) for i in range(300)]
    spoiled = ["Ann was born in Rome" not in found for found in engine.search(requests)]
    assert spoiled == [request.noisy for request in requests]
    assert sum(spoiled) / 300 == pytest.approx(p, abs=0.08)


def test_holds_answer():
    """Guards the general judge: any gold answer, whatever its capitals."""
    assert holds_answer("born in ROME", ask("q", answers=("Paris", "rome")))
    assert not holds_answer("born in Oslo", ask("q"))


def test_no_documents():
    """Guards the score from memory alone: one empty reply a request."""
    assert NoDocuments().search([ask("a"), ask("b")]) == [[], []]


# ---- corpora ------------------------------------------------------------------------------------

ROWS = [
    {"title": "Ann", "text": "born in Rome ,\n1950"},
    {"title": None, "text": "Acme hires"},
    {"title": "Oslo", "text": "a town"},
]
CONTENTS = ['"Ann"\nborn in Rome ,\n1950', "Acme hires", '"Oslo"\na town']


def write(path, rows):
    if path.suffix == ".txt":
        path.write_text("\n\n".join(" ".join(row.split()) for row in rows) + "\n \n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.mark.parametrize(
    "name, rows",
    [
        ("a.jsonl", [{"id": str(i), "contents": text} for i, text in enumerate(CONTENTS)]),
        ("a.parquet", [{"contents": text, "title": "no", "text": "no"} for text in CONTENTS]),
        ("a.jsonl", ROWS),
        ("a.json", ROWS),
        ("a.parquet", [{"text": text} for text in CONTENTS]),
        ("a.txt", CONTENTS),
    ],
)
def test_corpora_in_their_usual_layouts(tmp_path, name, rows):
    """Guards layouts that are read otherwise than their publishers meant, and blank documents."""
    engine = BM25.of_corpus(write(tmp_path / name, rows), top_k=3)
    found = engine.search([ask("hires"), ask("rome 1950"), ask("oslo town")])
    texts = [" ".join(text.split()) for text in CONTENTS]
    assert [documents[0] for documents in found] == [texts[1], texts[0], texts[2]]
    assert sorted(found[0]) == sorted(texts)
    if name != "a.txt":
        assert list(load_corpus(tmp_path / name)) == CONTENTS  # as they stand


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("nowhere.txt", None, "There is no corpus"),
        ("a.txt", "", "a.txt has no text"),
        ("a.txt", "\n \n", "a.txt has no text"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.jsonl", '{"body": "x", "id": 1}\n', "no text in a column 'contents' or 'text'"),
        ("a.xml", "x", "is none of .json, .jsonl, .parquet, .csv, .tsv, .txt"),
        ("a.csv", "id,body\n1,x\n", "with 'title'); it has 'id', 'body'"),
        ("a.jsonl", '{"contents": "Malmö"}'.encode("latin-1"), "cannot be read"),
        ("a.jsonl", '{"contents": 3}\n{"contents": null}\n', "no text in"),
        ("a.jsonl", '{"title": "x", "text": " "}\n{"text": null, "title": "x"}\n', "no text in"),
    ],
)
def test_files_that_are_no_corpus(tmp_path, name, content, said):
    """Guards tracebacks from three libraries down for a wrong file."""
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)):
        BM25.of_corpus(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_rows_without_text_are_left_out(tmp_path, suffix):
    """Guards "None" and blanks as documents, and dates that become times."""
    rows = [("Ann", None), (None, "1965-01-07"), ("Ann", " \n"), ("1965-01-07", "2001-02-03")]
    rows = [{"title": title, "text": text} for title, text in rows]
    path = write(tmp_path / f"a.{suffix}", rows)
    assert list(load_corpus(path)) == ["1965-01-07", '"1965-01-07"\n2001-02-03']
    path = write(tmp_path / f"b.{suffix}", [{"contents": text} for text in (None, "", "x")])
    assert BM25.of_corpus(path).search([ask("x")]) == [["x"]]


def test_a_corpus_of_many_kinds_of_rows(tmp_path):
    """Guards rows that are refused since those before them are of another form."""
    rows = [
        {"contents": "1965-01-07", "id": 1},
        {"contents": "x", "id": "2", "date": "2001-02-03"},
        {"text": "y", "title": "z"},
        {"contents": ["no"]},
        {"contents": 5},
    ]
    assert list(load_corpus(write(tmp_path / "a.jsonl", rows))) == ["1965-01-07", "x", '"z"\ny']


def test_a_changed_corpus_is_read_anew(tmp_path):
    """Guards the documents of yesterday's file out of the library's cache."""
    for text in ("one", "another"):
        assert list(load_corpus(write(tmp_path / "a.jsonl", [{"text": text}]))) == [text]


def test_an_index_is_made_once_and_again_when_the_corpus_changes(tmp_path, monkeypatch):
    """Guards hours spent on an index that is there, and an index of another corpus."""
    path, made = write(tmp_path / "a.txt", DOCUMENTS), []
    make = ranking.make_index
    monkeypatch.setattr(ranking, "make_index", lambda texts: made.append(1) or make(texts))
    requests = [ask("Ann born in", noisy) for noisy in (False, True)]
    expected = BM25(DOCUMENTS, 3).search(requests)
    made.clear()
    for _ in range(2):
        engine = BM25.of_corpus(path, 3)
        assert engine.search(requests) == expected
    assert len(made) == 1 and isinstance(engine.index.scores["data"], np.memmap)
    write(path, ["Cid likes cats", *DOCUMENTS])
    assert BM25.of_corpus(path, 1).search([ask("Cid cats")]) == [["Cid likes cats"]]
    os.utime(path, (1, 1))
    BM25.of_corpus(path, 1)
    assert len(made) == 3


def test_an_index_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    """Guards half an index, left by a run that was killed, that is then loaded."""
    path = write(tmp_path / "a.txt", DOCUMENTS)
    with monkeypatch.context() as broken:
        broken.setattr(np, "save", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            BM25.of_corpus(path)
    assert list(tmp_path.iterdir()) == [path]
    assert BM25.of_corpus(path).search([ask("Oslo lies")])[0][0] == DOCUMENTS[8]
    [folder] = tmp_path.glob("*.bm25")
    rmtree(folder)
    folder.write_text("in the way")
    with pytest.raises(UserError, match="cannot be saved beside it"):
        BM25.of_corpus(path)


def test_processes_that_make_the_same_index_share_it(tmp_path, monkeypatch):
    """Guards a crash of the process that comes second."""
    path, make = write(tmp_path / "a.txt", DOCUMENTS), ranking.make_index

    def slowly(texts):
        monkeypatch.setattr(ranking, "make_index", make)
        BM25.of_corpus(path)  # another process, from beginning to end
        return make(texts)

    monkeypatch.setattr(ranking, "make_index", slowly)
    assert BM25.of_corpus(path, 1).search([ask("Oslo lies")]) == [[DOCUMENTS[8]]]
    assert len(list(tmp_path.iterdir())) == 2
