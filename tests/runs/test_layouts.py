"""Data sets and corpora are read as their publishers write them: a small file of each layout."""

import copy
import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from minizs import UserError
from minizs.engines import files
from minizs.engines.corpus import load_corpus
from minizs.runs import data

# What every layout below says: question, golds.
PARIS = ("Where does Ann live?", ("Paris", "City of Light"))
ALIASES = {"Value": "Paris", "Aliases": ["City of Light"], "NormalizedAliases": ["city of light"]}

HOTPOTQA = {
    "_id": "5a7a",
    "answer": "Paris",
    "question": PARIS[0],
    "supporting_facts": [["Ann", 0]],
    "context": [["Ann", ["Ann lives in Paris."]]],
    "type": "bridge",
    "level": "hard",
}
MIXED_LISTS = ("context", "supporting_facts")
TWO_WIKI = HOTPOTQA | {"evidences": [["Ann", "residence", "Paris"]], "answer_id": "Q90"}
MUSIQUE = {
    "id": "2hop__1_2",
    "paragraphs": [{"idx": 0, "title": "Ann", "paragraph_text": "x", "is_supporting": True}],
    "question": PARIS[0],
    "question_decomposition": [{"id": 1, "question": "Ann >> home", "answer": "no"}],
    "answer": "Paris",
    "answer_aliases": ["City of Light"],
    "answerable": True,
}
TRIVIAQA = {
    "Answer": ALIASES | {"Type": "WikipediaEntity", "NormalizedValue": "paris"},
    "EntityPages": [{"Title": "no"}],
    "Question": PARIS[0],
    "QuestionId": "tc_1",
    "QuestionSource": "http://example.org",
    "SearchResults": [],
}
TRIVIAQA_HUB = {
    "question": PARIS[0],
    "question_id": "tc_1",
    "answer": {
        "aliases": ["Paris", "City of Light"],
        "normalized_aliases": ["paris", "city of light"],
        "normalized_value": "paris",
        "type": "WikipediaEntity",
        "value": "Paris",
    },
}
SQUAD_HUB = {
    "id": "1",
    "title": "Ann",
    "context": "Ann lives in Paris.",
    "question": PARIS[0],
    "answers": {"text": ["Paris", "City of Light"], "answer_start": [13, 0]},
}
POPQA = {
    "id": 7,
    "subj": "Ann",
    "prop": "residence",
    "obj": "no",
    "question": PARIS[0],
    "possible_answers": json.dumps(PARIS[1]),
}
WEB_QUESTIONS = {
    "url": "http://www.freebase.com/view/en/ann",
    "targetValue": '(list (description Paris) (description "City of Light"))',
    "utterance": PARIS[0],
}
KILT = {
    "id": "1",
    "input": PARIS[0],
    "output": [
        {"answer": "Paris", "provenance": [{"wikipedia_id": "1", "title": "no"}]},
        {"answer": "City of Light"},
        {"provenance": [{"wikipedia_id": "2"}]},
    ],
    "meta": {"left_context": ""},
}
ROWS = {
    "hotpotqa": (HOTPOTQA, ("Paris",)),
    "2wikimultihopqa": (TWO_WIKI, ("Paris",)),
    "musique": (MUSIQUE, PARIS[1]),
    "triviaqa": (TRIVIAQA, PARIS[1]),
    "triviaqa_hub": (TRIVIAQA_HUB, PARIS[1]),
    "squad_hub": (SQUAD_HUB, PARIS[1]),
    "popqa": (POPQA, PARIS[1]),
    "bamboogle": ({"Question": PARIS[0], "Answer": "Paris"}, ("Paris",)),
    "nq_open": ({"question": PARIS[0], "answer": [*PARIS[1]]}, PARIS[1]),
    "web_questions": (WEB_QUESTIONS, PARIS[1]),
    "web_questions_hub": ({"url": "x", "question": PARIS[0], "answers": [*PARIS[1]]}, PARIS[1]),
    "kilt": (KILT, PARIS[1]),
    "strategyqa": ({"qid": "1", "term": "x", "question": PARIS[0], "answer": True}, ("yes",)),
    "multiple_choice": ({"question": PARIS[0], "answer": "A"}, ("A",)),
    "flashrag": ({"id": "test_0", "question": PARIS[0], "golden_answers": [*PARIS[1]]}, PARIS[1]),
}


def write(path: Path, rows: list[dict]) -> str:
    """Rows in the format that the file's name says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        content = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
        raw = content.getvalue()
    elif name.endswith((".csv", ".tsv")):
        table = io.StringIO()
        writer = csv.DictWriter(table, [*rows[0]], delimiter="\t" if ".tsv" in name else ",")
        writer.writeheader()
        writer.writerows(rows)  # lists and objects as Python writes them
        raw = table.getvalue().encode()
    else:
        separator = "\n" if ".jsonl" in name else None
        text = "\n".join(map(json.dumps, rows)) if separator else json.dumps(rows, indent=2)
        raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def load(path: str) -> tuple[list, str]:
    """(examples, what was said while they were read)."""
    sentences: list[str] = []
    return data.load_examples(path, "test", say=sentences.append), "\n".join(sentences)


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_in_every_format(tmp_path, layout, suffix, compressed):
    """The question and all golds are those of the published row, whatever the file's format."""
    row, golds = ROWS[layout]
    if ".parquet" in suffix:  # whose lists hold one type
        row = {name: value for name, value in row.items() if name not in MIXED_LISTS}
    path = write(tmp_path / f"{layout}{suffix}{compressed}", [row])
    [example], _ = load(path)
    assert (example.question, example.answers, example.source) == (PARIS[0], golds, layout)


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Ann",
            "paragraphs": [
                {
                    "context": "Ann lives in Paris.",
                    "qas": [
                        {
                            "id": "1",
                            "question": PARIS[0],
                            "answers": [
                                {"text": "Paris", "answer_start": 13},
                                {"text": "City of Light", "answer_start": 0},
                            ],
                            "is_impossible": False,
                        },
                        {
                            "id": "2",
                            "question": "Where does Bob live?",
                            "answers": [],
                            "plausible_answers": [{"text": "Paris", "answer_start": 13}],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}


@pytest.mark.parametrize("indent", [None, 2])
def test_squads_own_files(tmp_path, indent):
    """Questions of all paragraphs of all articles; those without an answer are counted."""
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps(SQUAD, indent=indent))
    [example], sentences = load(str(path))
    assert (example.question, example.answers) == PARIS
    assert "left out: 1 unanswerable" in sentences
    version_1 = copy.deepcopy(SQUAD)
    questions = version_1["data"][0]["paragraphs"][0]["qas"]
    del questions[0]["is_impossible"], questions[1]
    path.write_text(json.dumps(version_1, indent=indent))
    assert load(str(path))[0] == [example]


@pytest.mark.parametrize("indent", [None, 2])
def test_triviaqas_own_files(tmp_path, indent):
    """The questions stand under "Data", and every name begins with a capital."""
    path = tmp_path / "wikipedia-dev.json"
    whole = {"Data": [TRIVIAQA], "Domain": "wikipedia", "Split": "dev", "Version": 1.0}
    path.write_text(json.dumps(whole, indent=indent))
    [example], _ = load(str(path))
    assert (example.question, example.answers) == PARIS


@pytest.mark.parametrize(
    "row",
    [
        MUSIQUE | {"question": "Unanswered?", "answerable": False},
        SQUAD_HUB | {"question": "Unanswered?", "answers": {"text": [], "answer_start": []}},
        {"question": "Unanswered?", "answer": "x", "is_impossible": "True"},
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_unanswerable_questions_are_counted(tmp_path, row, suffix):
    """A question that its publisher marks as unanswerable is left out, and that is said."""
    answered = dict.fromkeys(row) | {"question": "Answered?"}
    answered |= {name: row[name] for name in row if name in ("answer", "answers")}
    if "answers" in row:
        answered["answers"] = SQUAD_HUB["answers"]
    [example], sentences = load(write(tmp_path / f"mine{suffix}", [answered, row]))
    assert example.question == "Answered?" and "left out: 1 unanswerable" in sentences


def test_booleans_are_yes_and_no(tmp_path):
    """True is "yes"; in a table, which has no types, only where all golds are true or false."""
    rows = [{"question": f"q{i}?", "answer": answer} for i, answer in enumerate((True, False))]
    for suffix in (".jsonl", ".csv", ".parquet"):
        examples, _ = load(write(tmp_path / f"strategy{suffix}", rows))
        assert [e.answers for e in examples] == [("yes",), ("no",)]
    rows.append({"question": "which song?", "answer": "True"})
    examples, _ = load(write(tmp_path / "songs.csv", [*rows, {"question": "r?", "answer": "x"}]))
    assert [e.answers for e in examples] == [("True",), ("False",), ("True",), ("x",)]
    examples, _ = load(write(tmp_path / "texts.jsonl", rows))
    assert [e.answers for e in examples] == [("yes",), ("no",), ("True",)]


@pytest.mark.parametrize(
    "cell, golds",
    [
        ('["Paris", "City of Light"]', PARIS[1]),  # JSON
        ("['Paris', 'City of Light']", PARIS[1]),  # Python
        ("['Paris'\n 'City of Light']", PARIS[1]),  # NumPy
        ("{'text': array(['Paris', 'City of Light'], dtype=object), 'answer_start': array([1])}",)
        + (PARIS[1],),  # what the `datasets` library writes into a table
        ('["it\'s", "a, b"]', ("it's", "a, b")),
        ("['Paris', nan]", ("Paris",)),
        ("[0, 1]", ("[0, 1]",)),  # an interval
        ("[1] a note", ("[1] a note",)),
        ("{x", ("{x",)),
    ],
)
def test_lists_that_are_written_as_text(tmp_path, cell, golds):
    """A list of texts is read as one, however it was written; other texts stay as they are."""
    row = {"question": PARIS[0], "answers": cell}
    [example], _ = load(write(tmp_path / "mine.csv", [row]))
    assert example.answers == golds


def test_what_was_taken_is_said_once(tmp_path):
    """One sentence names the columns of question and golds, and where the source comes from."""
    path = write(tmp_path / "musique.jsonl", [MUSIQUE])
    _, sentences = load(path)
    assert sentences == (
        f"{path}: questions from 'question', golds from 'answer' and 'answer_aliases', "
        "source 'musique', its name."
    )


def test_options_beside_the_question(tmp_path):
    """A letter as the gold means nothing without the options: it is said that they are not read."""
    row = {"question": PARIS[0], "choices": ["Oslo", "Paris"], "answer": "B"}
    [example], sentence = load(write(tmp_path / "mmlu.jsonl", [row]))
    assert example.answers == ("B",)
    assert sentence.endswith("'choices' is not read: options have to stand in the question.")


def test_a_refusal_says_what_it_saw_and_needs(tmp_path):
    """The columns as they are written in the file, and those that would be read."""
    path = write(tmp_path / "mine.csv", [{"Query": "a", "Gold answer": "b"}])
    with pytest.raises(UserError) as error:
        load(path)
    sentence = str(error.value)
    assert "it has 'Query', 'Gold answer'" in sentence
    assert "'question', 'utterance' or 'input'" in sentence and "'golden_answers'" in sentence


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", b"question,answer\nq,x,y\n", "more cells than there are columns"),
        ("a.csv", b'question,answer\n"q" and,x\n', "near row 1"),
        ("a.tsv", b"question\tanswer\nq\tx\ty\n", "more cells than there are columns"),
        ("a.csv", b'question,answer\nq,"x\n', "near row 1"),
        ("a.jsonl.gz", b"no gzip", "Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "q", "answer": "x"}' * 99)[:-9], "near row"),
        ("a.json", b'{"question": "q"', "near row 1"),
    ],
)
def test_broken_files(tmp_path, name, content, words):
    """One sentence with the file and the place; nothing of a broken file is used."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        load(str(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("compressed", ["", ".gz"])
def test_a_table_that_quotes_no_cell(tmp_path, compressed):
    """A .tsv may have quotation marks of its own, also at the beginning of a cell. Rows before
    the first such one are read by the rules of quoting."""
    text = (
        'question\tanswer\n"a ""quoted"" cell?"\t["Al", "Bo"]\n'
        '"Heroes" is by whom?\tBowie\nwho?\t"x\nwhy?\t"y" z\n'
    )
    path = tmp_path / f"a.tsv{compressed}"
    content = text.encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if compressed else content)
    examples, _ = load(str(path))
    assert [(example.question, example.answers) for example in examples] == [
        ('a "quoted" cell?', ("Al", "Bo")),
        ('"Heroes" is by whom?', ("Bowie",)),
        ("who?", ('"x',)),
        ("why?", ('"y" z',)),
    ]


def test_columns_that_are_ids(tmp_path):
    """A refusal names the first columns of an object whose keys are ids, and counts the others."""
    rows = {f"id{number}": {"question": "q?", "answer": "x"} for number in range(2000)}
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="it has 'id0', .*'id29' and 1970 more"):
        load(str(tmp_path / "a.json"))


def test_the_letter_of_a_choice(tmp_path):
    """ARC and CommonsenseQA have it in `answerKey`."""
    row = {"question": "q?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "A"}
    [example], _ = load(write(tmp_path / "arc.jsonl", [row]))
    assert example.answers == ("A",)


def test_long_cells(tmp_path):
    """A cell can be longer than the 131,072 characters at which Python's reader stops by default,
    and can hold line breaks."""
    rows = [{"question": "q?", "context": "word\n" * 100_000, "answer": "x"}]
    [example], _ = load(write(tmp_path / "a.csv", rows))
    assert example.answers == ("x",)


def test_a_comma_in_a_files_name(tmp_path, monkeypatch):
    """A file whose name holds a comma can stand beside another one."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c.jsonl"):
        write(tmp_path / name, [{"question": f"{name}?", "answer": "x"}])
    for spec in ("a,b.jsonl,c.jsonl", "c.jsonl, a,b.jsonl"):
        assert {e.source for e in load(spec)[0]} == {"a,b", "c"}


WIKI_18 = {"id": "0", "contents": '"Ann"\nAnn lives in Paris.'}
DPR = {"id": "1", "text": "Ann lives in Paris.", "title": "Ann"}
PAGE = {
    "wikipedia_title": "Ann",
    "wikipedia_id": 1,
    "text": [
        "Ann\n",
        "Ann lives in Paris.\n",
        "Section::::Works.\n",
        "BULLET::::- A song\n",
        "long " * 100 + "\n",
        "The end.\n",
    ],
    "anchors": [],
    "categories": "People",
}


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".tsv", ".csv", ".parquet"])
@pytest.mark.parametrize("row", [WIKI_18, DPR, {"ID": "1", "Text": DPR["text"], "Title": "Ann"}])
def test_corpora_of_passages(tmp_path, row, suffix, compressed):
    """wiki-18's `contents`, and DPR's `text` and `title`, give the same documents."""
    path = tmp_path / f"corpus{suffix}{compressed}"
    write(path, [row])
    assert load_corpus(path) == ['"Ann"\nAnn lives in Paris.']


def test_kilts_knowledge_source(tmp_path):
    """A page becomes passages of whole paragraphs, each with the page's title, no headings."""
    path = tmp_path / "kilt_knowledgesource.json"
    path.write_text("\n".join(map(json.dumps, [PAGE, PAGE | {"text": ["Ann\n"]}])))
    first, second = load_corpus(path)
    assert first == '"Ann"\nAnn lives in Paris. A song ' + ("long " * 100).strip()
    assert second == '"Ann"\nThe end.'


@pytest.mark.parametrize(
    "paragraphs",
    [
        {"paragraph": ["Ann\n", "Ann lives in Paris.\n"]},
        [{"paragraph": "Ann\n"}, {"paragraph": "Ann lives in Paris.\n"}],
        [["Ann\n"], ["Ann lives ", "in Paris.\n"]],
        [None, "Ann lives in Paris."],
    ],
)
def test_pages_whose_paragraphs_are_no_texts(tmp_path, paragraphs):
    """The hub has KILT's paragraphs as objects; other dumps have lists of sentences."""
    page = {"wikipedia_title": "Ann", "text": paragraphs}
    assert load_corpus(Path(write(tmp_path / "a.jsonl", [page]))) == ['"Ann"\nAnn lives in Paris.']


SQUAD_ARTICLES = [
    {
        "title": "Ann_Bell",
        "paragraphs": [
            {"context": "Ann lives in Paris.", "qas": [{"question": "Where?", "answers": []}]},
            {"context": "She sings.", "qas": []},
            {"context": " ", "qas": []},
        ],
    },
    {"title": "Bo", "paragraphs": [{"context": "Bo is a dog.", "qas": []}]},
]
SQUAD_DOCUMENTS = [
    '"Ann Bell"\nAnn lives in Paris.',
    '"Ann Bell"\nShe sings.',
    '"Bo"\nBo is a dog.',
]


@pytest.mark.parametrize("indent", [None, 2])
def test_squads_articles(tmp_path, indent):
    """A file of questions is a corpus of its paragraphs, too: whole, or an article a row."""
    whole = tmp_path / "dev-v1.1.json"
    whole.write_text(json.dumps({"version": "1.1", "data": SQUAD_ARTICLES}, indent=indent))
    assert load_corpus(whole) == SQUAD_DOCUMENTS
    assert load_corpus(Path(write(tmp_path / "a.jsonl", SQUAD_ARTICLES))) == SQUAD_DOCUMENTS


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "pages",
    [
        {"Ann": "Ann lives in Paris. She sings.", "Bo": " ", "Cy": "Cy sings."},
        {"Ann": ["Ann lives in Paris.", " She sings."], "Bo": [], "Cy": ["Cy sings."]},
    ],
)
def test_pages_by_their_titles(tmp_path, pages, indent):
    """One object for the whole file: each title with a text or with its sentences, as samples of
    HotpotQA have it."""
    path = tmp_path / "pages.json"
    path.write_text(json.dumps(pages, indent=indent))
    assert load_corpus(path) == ['"Ann"\nAnn lives in Paris. She sings.', '"Cy"\nCy sings.']


@pytest.mark.parametrize(
    "name, rows",
    [
        ("a.json", [{"id": 1, "body": "x"}]),
        ("a.json", [{"id": "1", "body": "x"}, {"id": "2", "body": "y"}]),
        ("a.jsonl", [{"id": "1", "body": "x"}]),
        ("a.json", [{"id": "1", "passages": [{"body": "x"}]}]),
    ],
)
def test_columns_of_other_names_are_no_titles(tmp_path, name, rows):
    """A table of rows is refused, and not taken for pages that are called as its columns."""
    with pytest.raises(UserError, match="no text in a column"):
        load_corpus(Path(write(tmp_path / name, rows)))


def test_names_without_formats():
    """The name of a data set is its file's, without the format and the compression."""
    for name in ("nq.jsonl", "nq.jsonl.gz", "nq.parquet", "nq.csv.gz"):
        assert files.bare_name(Path("folder.x", name)) == "nq"
    assert files.bare_name(Path("dev-v1.1.json")) == "dev-v1.1"
    assert files.file_format(Path("a.zip")) == files.file_format(Path("a.gz")) == ""
