"""Questions from files, and which of them a step trains on."""

import json
from datetime import date
from decimal import Decimal

import pytest

from minizs import UserError
from minizs.runs import data
from minizs.trajectory import Example
from minizs.world.facts import embedded

ROWS = [
    {"question": "q1?", "golden_answers": ["x", "y"], "data_source": "nq"},
    {"question": "q2?", "golden_answers": ["c"], "data_source": "hotpot"},
]
EXPECTED = [Example("q1?", ("x", "y"), "nq"), Example("q2?", ("c",), "hotpot")]


def write(path, rows):
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The library keeps a copy of what it reads: not in the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_every_format_gives_the_same_examples(tmp_path, name):
    """All golds and the source of a question are those of its row, in whatever format."""
    assert data.load_examples(write(tmp_path / name, ROWS), "test") == EXPECTED


def test_odd_rows(tmp_path):
    """A plain answer is one gold; rows that could never score are left out."""
    rows = [
        {"question": "q1?", "answer": "abc"},
        {"question": "q2?", "answer": " "},
        {"question": "", "answer": "x"},
        {"question": "q4?", "answer": None},
    ]
    path = write(tmp_path / "mine.jsonl", rows)
    assert data.load_examples(path, "test") == [Example("q1?", ("abc",), "mine")]
    with pytest.raises(UserError, match="no row"):
        data.load_examples(write(tmp_path / "none.jsonl", rows[1:]), "train")


@pytest.mark.parametrize(
    "row, missing",
    [({"query": "q", "answer": "a"}, "question"), ({"question": "q", "gold": "a"}, "answers")],
)
def test_a_missing_column_is_named_with_those_found(tmp_path, row, missing):
    """A refusal names the columns that are there and those that are needed."""
    with pytest.raises(UserError, match=f"needs columns .*'{missing}'") as error:
        data.load_examples(write(tmp_path / "a.jsonl", [row]), "train")
    assert all(repr(name) in str(error.value) for name in row)


def test_wrong_files(tmp_path):
    """A wrong path or format is refused by the check, before anything is read."""
    (tmp_path / "file.xml").write_text("question,answer")
    for spec, words in (
        (tmp_path / "no.jsonl", "check the path"),
        ("no/such.parquet", "check the path"),
        (tmp_path / "file.xml", "neither"),
        (tmp_path, "neither"),
        ("dataset", "neither"),
        ("some/data/set", "neither"),
        ("nq,world", "neither"),
        ("nq,,hotpotqa", "neither"),
    ):
        for function in (data.check_spec, lambda spec: data.load_examples(spec, "train")):
            with pytest.raises(UserError, match=words):
                function(str(spec))
    (tmp_path / "bad.jsonl").write_text("no json")
    with pytest.raises(UserError, match="cannot be read near row 1: Expecting value"):
        data.load_examples(str(tmp_path / "bad.jsonl"), "train")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"question": "q?", "answer": "Malm\xf6"}\n', "cannot be read .*utf-8"),
        ("a.json", b'[{"question": "q?", "answer": "x"}, 3]', "row 2 is no object"),
        ("a.jsonl", b'{"question": "q?", "answer": "x"}\n{', "near row 2"),
        ("a.parquet", b"PAR1 or not", "a.parquet cannot be read .*(?i:parquet)"),
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.json", b"[]", "a.json has no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    """A file that cannot be read is one sentence, with its cause and the row."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        data.load_examples(str(tmp_path / name), "test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    "answer",
    ["1965-01-07", ["1965-01-07", "12:30:00"], {"target": "2001"}, "1.50", "null", "true", "007"],
)
def test_texts_stay_as_they_were(tmp_path, answer, suffix):
    """A text of JSON stays the text that it is: no date, number, null or boolean is made of it."""
    golds = (
        answer
        if isinstance(answer, list)
        else [*answer.values()]
        if isinstance(answer, dict)
        else [answer]
    )
    path = write(tmp_path / f"mine.{suffix}", [{"question": "2020-02-02", "answer": answer}])
    assert data.load_examples(path, "test") == [Example("2020-02-02", tuple(golds), "mine")]


def test_numbers_as_golds(tmp_path):
    """A number is a gold; a missing one is none."""
    rows = [{"question": f"q{x}?", "answer": x} for x in (1990.5, 0.5, None)]
    for name in ("a.parquet", "a.jsonl"):
        examples = data.load_examples(write(tmp_path / name, rows), "test")
        assert [e.answers for e in examples] == [("1990.5",), ("0.5",)]


def test_what_parquet_has_for_numbers_and_days(tmp_path):
    """A whole number in a column with gaps is still one, and days and exact numbers are golds."""
    rows = {
        "1990": [{"question": "q?", "answer": 1990.0}, {"question": "r?", "answer": None}],
        "1990-01-02": [{"question": "q?", "answer": date(1990, 1, 2)}],
        "1.50": [{"question": "q?", "answer": Decimal("1.50")}],
    }
    for gold, table in rows.items():
        [example] = data.load_examples(write(tmp_path / "a.parquet", table), "test")
        assert example.answers == (gold,)


def test_rows_that_differ(tmp_path):
    """The golds are those of the first column that has some, row by row."""
    rows = [
        {"question": "q1?", "golden_answers": None, "answers": ["x"], "data_source": None},
        {"question": "q2?", "golden_answers": [], "answers": ["y"], "data_source": "nq"},
        {"question": "q3?", "golden_answers": ["z"], "answers": ["no"]},
        {"question": "q4?", "answer": 3},
    ]
    golds = {"mine.jsonl": "x y z 3", "mine.parquet": "x y z"}  # whose rows have the same columns
    for name, expected in golds.items():
        examples = data.load_examples(write(tmp_path / name, rows[: len(expected.split())]), "test")
        assert [e.answers for e in examples] == [(gold,) for gold in expected.split()]
        assert [e.source for e in examples][:3] == ["mine", "nq", "mine"]


def test_the_byte_order_mark_of_other_editors(tmp_path):
    """A byte order mark at the beginning is passed over."""
    (tmp_path / "a.jsonl").write_text('{"question": "q?", "answer": "x"}\n\n', "utf-8-sig")
    (tmp_path / "a.json").write_text('[{"question": "q?", "answer": "x"}]', "utf-8-sig")
    for name in ("a.json", "a.jsonl"):
        assert data.load_examples(str(tmp_path / name), "test") == [Example("q?", ("x",), "a")]


LAYOUTS = {
    "ZeroSearch": {
        "question": "q?",
        "golden_answers": ["x", "y"],
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "p"}],
        "reward_model": {"style": "rule", "ground_truth": {"target": ["x", "y"]}},
    },
    "Search-R1": {
        "question": "q?",
        "data_source": "nq",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["x", "y"]}},
    },
    "FlashRAG": {
        "id": "dev_0",
        "question": "q?",
        "golden_answers": ["x", "y"],
        "metadata": {"type": "bridge"},
    },
    "HotpotQA": {"id": "5a7a", "question": "q?", "answer": "x", "type": "bridge"},
    "NQ-open": {"question": "q?", "answer": ["x", "y"]},
    "plain": {"question": "q?", "answers": ["x", "y"]},
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised(tmp_path, layout, suffix):
    """The columns of ZeroSearch, Search-R1, FlashRAG and others are recognised."""
    path = write(tmp_path / f"mine.{suffix}", [LAYOUTS[layout]])
    golds = ("x",) if layout == "HotpotQA" else ("x", "y")
    source = LAYOUTS[layout].get("data_source", "mine")
    assert data.load_examples(path, "test") == [Example("q?", golds, source)]


def test_what_cannot_be_trained_on_is_left_out_and_counted(tmp_path, capsys):
    """What is left out is counted by its reason, and said once."""
    rows = [
        {"question": "Who is it?", "answer": "x", "data_source": "nq"},
        {"question": " who is it ", "answer": "y", "data_source": "nq"},  # the same
        {"question": "Who is it?", "answer": "x", "data_source": "hotpot"},  # another set's
        {"question": "q2?", "answer": "?!", "data_source": "nq"},  # normalises to nothing
        {"question": "q3?", "answer": None, "data_source": "nq"},
        {"question": "q" * data.LONGEST, "answer": "x", "data_source": "nq"},
        {"question": "q" * data.LONGEST + "?", "answer": "x", "data_source": "nq"},
    ]
    path = write(tmp_path / "mine.jsonl", rows)
    sentences = []
    examples = data.load_examples(path, "test", say=sentences.append)
    assert [(e.question[:10], e.source) for e in examples] == [
        ("Who is it?", "nq"),
        ("Who is it?", "hotpot"),
        ("qqqqqqqqqq", "nq"),
    ]
    [columns, sentence] = sentences
    assert columns.endswith(
        "questions from 'question', golds from 'answer', source from 'data_source'."
    )
    counts = "1 repeated, 2 without question or answer, 1 over-long."
    assert sentence.startswith("3 questions of ") and counts in sentence
    data.load_examples(path, "dev")
    assert capsys.readouterr().out == ""  # once is enough
    data.load_examples(write(tmp_path / "fine.jsonl", rows[:1]), "test", say=sentences.append)
    assert len(sentences) == 3 and "left out" not in sentences[2]


def test_several_files_with_any_name(tmp_path, monkeypatch):
    """Any name of a file is taken as it is: brackets, braces and commas too."""
    folder = tmp_path / "run [1]*"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("a.jsonl", "b{c}?.parquet", "d,e.json"):
        write(folder / name, [{"question": f"{name}?", "answer": "x"}])
    examples = data.load_examples("a.jsonl, b{c}?.parquet", "test")
    assert [(e.question, e.source) for e in examples] == [
        ("a.jsonl?", "a"),
        ("b{c}?.parquet?", "b{c}?"),
    ]
    assert data.load_examples("d,e.json", "test") == [Example("d,e.json?", ("x",), "d,e")]
    assert data.load_examples(str(folder / "a.jsonl"), "test") == examples[:1]


@pytest.fixture
def hub(monkeypatch):
    """In the hub's place: a table for each name and config, and what was asked for."""
    import datasets

    tables = {}
    lookups = []
    local = datasets.load_dataset

    def load_dataset(path, name=None, *, data_files=None, split=None):
        if data_files:
            return local(path, data_files=data_files, split=split)
        lookups.append((path, name))
        if (path, name) not in tables:
            raise datasets.exceptions.DatasetNotFoundError(f"No dataset {path}\nthere")
        splits = tables[path, name]
        return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tables, lookups


def rows(split, n=1):
    return [{"question": f"{split}{i}?", "golden_answers": ["x"]} for i in range(n)]


def test_hub_names(tmp_path, hub):
    """A test takes the hub's test split, training its train split; a configuration counts."""
    tables, lookups = hub
    splits = {name: rows(name, 40) for name in ("train", "dev", "test")}
    tables["org/name", None] = splits
    tables["org/name", "config"] = {"validation": rows("validation"), "train": rows("t")}
    test = data.load_examples("org/name", "test")
    assert {e.question[:4] for e in test} == {"test"} and test[0].source == "name"
    train, dev = (data.load_examples("org/name", role) for role in ("train", "dev"))
    assert len(train) + len(dev) == 40 and train and dev
    assert {e.question[:5] for e in train + dev} == {"train"}
    path = write(tmp_path / "mine.jsonl", ROWS)
    examples = data.load_examples(f"{path},org/name:config", "test")
    assert examples == [*EXPECTED, Example("validation0?", ("x",), "name:config")]
    assert lookups == [("org/name", None)] * 3 + [("org/name", "config")]


def test_the_papers_sets_have_short_names(hub):
    """The paper's sets have short names, and a test takes the split that each of them has."""
    tables, lookups = hub
    split_names = {
        "nq": "train dev test",
        "triviaqa": "train dev test",
        "popqa": "test",
        "hotpotqa": "train dev",
        "2wikimultihopqa": "train dev",
        "musique": "train dev",
        "bamboogle": "test",
    }
    for name, splits in split_names.items():
        key = ("RUC-NLPIR/FlashRAG_datasets", name)
        tables[key] = {split: rows(split) for split in splits.split()}
    examples = data.load_examples("paper", "test")
    assert [e.source for e in examples] == list(split_names)
    expected = ["dev0?" if "test" not in splits else "test0?" for splits in split_names.values()]
    assert [e.question for e in examples] == expected
    assert data.load_examples("nq,hotpotqa", "test") == [examples[0], examples[3]]
    assert {e.question for e in data.load_examples("nq,hotpotqa", "train")} == {"train0?"}
    with pytest.raises(UserError, match="popqa has no split 'train'; it has test"):
        data.load_examples("nq,popqa", "train")
    assert {name for _, name in lookups} == {*split_names}


def test_a_test_whose_golds_are_hidden(hub):
    """Where the hub's test split has no golds the next split is taken, and that is said."""
    tables, _ = hub
    hidden = [{"question": "hidden?", "answer": {"value": "<unk>", "aliases": []}}]
    known = [{"question": "known?", "answer": {"value": "x", "aliases": ["y"]}}]
    tables["org/name", None] = {"test": hidden, "validation": known, "train": known}
    sentences = []
    [example] = data.load_examples("org/name", "test", say=sentences.append)
    assert (example.question, example.answers) == ("known?", ("x", "y"))
    assert sentences[0].startswith("org/name (split 'validation'): questions from 'question'")


def test_a_hub_without_a_test(hub):
    """Without a test split the next one is taken; an error of the library is one sentence."""
    tables, _ = hub
    tables["org/name", None] = {"train": rows("train")}
    assert data.load_examples("org/name", "test")[0].question == "train0?"
    with pytest.raises(UserError, match="org/other cannot be read: No dataset org/other there"):
        data.load_examples("org/other", "test")


def test_a_local_file_wins(tmp_path, hub, monkeypatch):
    """A file that is here is not looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    write(tmp_path / "org" / "name.json", ROWS)
    assert data.load_examples("org/name.json", "test") == EXPECTED and hub[1] == []


def test_a_file_is_split_by_its_questions(tmp_path):
    """A tenth is held out, told by the question itself, wherever it stands in the file."""
    rows = [{"question": f"q{i}?", "answer": "x"} for i in range(200)]
    path, back = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])
    train, dev, test = (data.load_examples(path, role) for role in ("train", "dev", "test"))
    assert len(test) == 200 and sorted(train + dev, key=test.index) == test
    assert 8 <= len(dev) <= 35
    assert {e.question for e in data.load_examples(back, "dev")} == {e.question for e in dev}


def test_the_world_is_the_default():
    """By default the questions are the tiny world's, and each role has a world of its own."""
    data.check_spec("world")
    train, test = (data.load_examples("world", role) for role in ("train", "test"))
    questions = [(q.text, (q.answer,), q.kind) for q in embedded("train").questions()]
    assert [(e.question, e.answers, e.source) for e in train] == questions
    assert {e.source for e in train} == {e.source for e in test} == {"one_hop", "two_hop"}
    assert len({*train} & {*test}) < 0.01 * len(test)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_characters_are_no_text(tmp_path, name):
    """Half a character becomes "?", which a tokenizer takes; whole ones stay."""
    row = r'{"question": "a \ud83d\ude00 \uD800?", "answer": ["\udfff", "x\udfff"]}'
    (tmp_path / name).write_text(f"[{row}]" if name == "a.json" else row)
    [example] = data.load_examples(str(tmp_path / name), "test")
    assert example.question == "a \U0001f600 ??" and example.answers == ("x?",)


def test_questions_that_are_no_text(tmp_path):
    """A question that is no text is left out."""
    rows = [{"question": q, "answer": "x"} for q in (["a"], {"a": "b"}, 3, "why?")]
    assert [e.question for e in data.load_examples(write(tmp_path / "a.json", rows), "test")] == [
        "why?"
    ]
