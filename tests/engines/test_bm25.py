"""BM25 over corpora of the published layouts, and the index beside them."""

import json
import os
import re
from shutil import rmtree
from unittest import mock

import datasets
import numpy as np
import pytest
from test_ranking import DOCUMENTS, ask

from minizs import UserError
from minizs.engines import bm25
from minizs.engines.bm25 import BM25
from minizs.engines.corpus import load_corpus


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The user's cache folder: an empty one."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "minizs"


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
    """Each layout gives the documents that its publisher meant, and no blank ones."""
    engine = BM25.of_corpus(write(tmp_path / name, rows), top_k=3)
    replies = engine.search([ask("hires"), ask("rome 1950"), ask("oslo town")])
    texts = [" ".join(text.split()) for text in CONTENTS]
    assert [documents[0] for documents in replies] == [texts[1], texts[0], texts[2]]
    assert all(len(documents) == 1 for documents in replies)  # the others share no word
    if name != "a.txt":
        assert list(load_corpus(tmp_path / name)) == CONTENTS  # as they stand


@pytest.mark.parametrize(
    "name, content, sentence",
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
def test_files_that_are_no_corpus(tmp_path, name, content, sentence):
    """A file that is no corpus is refused in a sentence that says why."""
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        BM25.of_corpus(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_rows_without_text_are_left_out(tmp_path, suffix):
    """Rows without text are no documents, and dates stay as they are written."""
    rows = [("Ann", None), (None, "1965-01-07"), ("Ann", " \n"), ("1965-01-07", "2001-02-03")]
    rows = [{"title": title, "text": text} for title, text in rows]
    path = write(tmp_path / f"a.{suffix}", rows)
    assert list(load_corpus(path)) == ["1965-01-07", '"1965-01-07"\n2001-02-03']
    path = write(tmp_path / f"b.{suffix}", [{"contents": text} for text in (None, "", "x")])
    assert BM25.of_corpus(path).search([ask("x")]) == [["x"]]


def test_a_corpus_of_many_kinds_of_rows(tmp_path):
    """Rows of different forms in one file are each read as they are."""
    rows = [
        {"contents": "1965-01-07", "id": 1},
        {"contents": "x", "id": "2", "date": "2001-02-03"},
        {"text": "y", "title": "z"},
        {"contents": ["no"]},
        {"contents": 5},
    ]
    assert list(load_corpus(write(tmp_path / "a.jsonl", rows))) == ["1965-01-07", "x", '"z"\ny']


def test_a_changed_corpus_is_read_anew(tmp_path):
    """A file that has changed is read again."""
    for text in ("one", "another"):
        assert list(load_corpus(write(tmp_path / "a.jsonl", [{"text": text}]))) == [text]


def test_an_index_is_made_once_and_again_when_the_corpus_changes(tmp_path, monkeypatch):
    """An index is made once, used again, and made anew when the corpus or its time changes."""
    path = write(tmp_path / "a.txt", DOCUMENTS)
    indexes = []
    make = bm25.make_index
    monkeypatch.setattr(bm25, "make_index", lambda texts: indexes.append(1) or make(texts))
    requests = [ask("Ann born in", noisy) for noisy in (False, True)]
    expected = BM25(DOCUMENTS, 3).search(requests)
    indexes.clear()
    for _ in range(2):
        engine = BM25.of_corpus(path, 3)
        assert engine.search(requests) == expected
    assert len(indexes) == 1 and isinstance(engine.index.scores["data"], np.memmap)
    write(path, ["Cid likes cats", *DOCUMENTS])
    assert BM25.of_corpus(path, 1).search([ask("Cid cats")]) == [["Cid likes cats"]]
    os.utime(path, (1, 1))
    BM25.of_corpus(path, 1)
    assert len(indexes) == 3


def test_an_index_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    """A run that is killed while it makes an index leaves nothing behind."""
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
    with pytest.warns(UserWarning, match="is kept in"):
        BM25.of_corpus(path)


def test_processes_that_make_the_same_index_share_it(tmp_path, monkeypatch):
    """Two processes that make the same index at once end with one."""
    path = write(tmp_path / "a.txt", DOCUMENTS)
    make = bm25.make_index

    def slowly(texts):
        monkeypatch.setattr(bm25, "make_index", make)
        BM25.of_corpus(path)  # another process, from beginning to end
        return make(texts)

    monkeypatch.setattr(bm25, "make_index", slowly)
    assert BM25.of_corpus(path, 1).search([ask("Oslo lies")]) == [[DOCUMENTS[8]]]
    assert len(list(tmp_path.iterdir())) == 2


def read_only(monkeypatch, *folders):
    """These folders, and what is below them, cannot be written to."""
    make = bm25.TemporaryDirectory

    def refusing(dir):
        if any(dir.is_relative_to(folder) for folder in folders):
            raise PermissionError(13, "Permission denied", str(dir))
        return make(dir=dir)

    monkeypatch.setattr(bm25, "TemporaryDirectory", refusing)


def test_a_corpus_in_a_read_only_folder(tmp_path, monkeypatch, cache):
    """Its index is kept in the cache folder, which a note names, and is found there again."""
    path = write(tmp_path / "a.txt", DOCUMENTS)
    read_only(monkeypatch, tmp_path)
    with pytest.warns(UserWarning, match=f"cannot be written to: .* is kept in {cache}"):
        engine = BM25.of_corpus(path, 1)
    assert engine.search([ask("Oslo lies")]) == [[DOCUMENTS[8]]]
    assert list(tmp_path.iterdir()) == [path] and len(list(cache.iterdir())) == 1
    monkeypatch.setattr(bm25, "make_index", lambda texts: pytest.fail("it is there"))
    assert BM25.of_corpus(path, 1).search([ask("Oslo lies")]) == [[DOCUMENTS[8]]]


def test_an_index_that_can_be_saved_nowhere(tmp_path, monkeypatch, cache):
    """It is kept in memory, and a note says so."""
    path = write(tmp_path / "a.txt", DOCUMENTS)
    read_only(monkeypatch, tmp_path, cache)
    with pytest.warns(UserWarning, match="kept in memory"):
        engine = BM25.of_corpus(path, 1)
    assert engine.search([ask("Oslo lies")]) == [[DOCUMENTS[8]]]
    assert list(tmp_path.iterdir()) == [path]


# ---- words --------------------------------------------------------------------------------------

CHINESE = ["北京是中国的首都。", "鲁迅，原名周树人，是作家。", "上海是一座城市。"]


def test_scripts_without_spaces_are_searched_by_the_character():
    """A Chinese query finds the document that shares most of its characters."""
    engine = BM25(CHINESE, 1)
    assert engine.search([ask("中国的首都"), ask("《鲁迅》")]) == [[CHINESE[0]], [CHINESE[1]]]


def test_one_spelling_of_unicode():
    """Accents in two encodings, wide letters and curly quotation marks are the same words."""
    engine = BM25(["Ren\u00e9e lives here", "O\u2019Brien wrote it", "nothing of it"], 1)
    requests = [ask("RENE\u0301E"), ask("\uff22\uff52\uff49\uff45\uff4e brien")]
    assert [reply[0][:3] for reply in engine.search(requests)] == ["Ren", "O\u2019B"]


@pytest.mark.parametrize(
    "query, document",
    [
        ("दिल्ली", "दिल्ली भारत की राजधानी है"),
        ("كِتَابٌ", "كِتَابٌ جَدِيدٌ"),
        ("தமிழ்", "தமிழ் மொழி"),
        ("יְרוּשָׁלַיִם", "יְרוּשָׁלַיִם עיר"),
        ("co\u00adoperation", "the cooperation of many"),
        ("Hawaiʻi", "on Hawai'i it rains"),
        ("½", "add 1/2 of it"),
    ],
)
def test_a_word_is_whole_in_every_script(query, document):
    """Its accents and vowel signs belong to it: documents that share only these are not found."""
    others = ["गुलाब एक फूल चेन्नई", "مُحَمَّدٌ رَسُولٌ", "சென்னை நகரம்", "תַּפּוּחַ טעים"]
    [reply] = BM25([*others, document]).search([ask(query)])
    assert reply == [document]


@pytest.mark.parametrize("query", ["zzz", "", "\n", "東西"])
def test_what_shares_no_word_is_not_found(query):
    """A document of score 0 is no document: the reply is shorter, or empty."""
    assert BM25([*DOCUMENTS, *CHINESE]).search([ask(query)]) == [[]]
    assert BM25(DOCUMENTS).search([ask("Ann zzz dogs")])[0][0] == "Bob likes dogs"
    assert len(BM25(DOCUMENTS).search([ask("dogs")])[0]) == 1
