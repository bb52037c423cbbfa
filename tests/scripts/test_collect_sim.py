"""`train_sim.py --collect` on one's own questions: the plain searcher, breaking off, going on."""

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from scripts import FILE, NAMES, everything, refused, simulator, weights
from servers import serving

import train_sim
from minizs import UserError
from minizs.engines.bm25 import BM25
from minizs.engines.cache import BETWEEN_WRITES
from minizs.imitation.plain_searcher import search_plainly
from minizs.trajectory import SearchRequest

COLLECT = "--collect --data many.jsonl --top_k 1 --max_turns 3 --threads 1".split()
BM25_FLAGS = ["--corpus", "../corpus.txt", "--engine_noise", "0.3"]


def ask_for_many(times: int = 30) -> None:
    """`many.jsonl`: each question of the small data set many times, as questions of their own."""
    rows = [json.loads(line) for line in Path("../questions.jsonl").read_text().splitlines()]
    rows = [row | {"data_source": str(copy)} for copy in range(times) for row in rows]
    Path("many.jsonl").write_text("\n".join(map(json.dumps, rows)))


def rows_in(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "collected.jsonl").read_text().splitlines()]


def run_advice(message: str) -> str:
    """Run the command that a message gives, as a shell would, and return what it prints."""
    advised = shlex.split(re.search(r"Go on with: (.*)", message)[1])
    assert advised[0] == "python"
    process = subprocess.run([sys.executable, *advised[1:]], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_no_policy_is_needed(work):
    """The plain searcher collects useful and noisy rows from documents of one's own, and they train
    a simulator; the policy of the settings is not loaded, nor is there one in its folder."""
    ask_for_many()
    simulator(*COLLECT, *BM25_FLAGS, "--output", "out")
    rows = rows_in("out")
    corpus = Path("../corpus.txt").read_text().splitlines()
    assert min(Counter(row["label"] for row in rows).values()) > 10
    for row in rows:
        assert set(row["documents"]) <= {*corpus} and len(row["documents"]) == 1
        assert (row["label"] == "useful") == (row["answers"][0] in row["documents"][0])
    queries = {row["query"] for row in rows}
    questions = {row["question"].removesuffix("?") for row in rows}
    assert questions < queries  # and narrower ones
    assert len(questions) > len(NAMES) / 2
    settings = yaml.safe_load(Path("out/config.yaml").read_text())
    assert settings["collect"] and settings["data"] == "many.jsonl"
    simulator("--data", "out/collected.jsonl", "--output", "sim")
    assert weights(work / "sim") != weights(work.parent / "base")


@pytest.mark.parametrize(
    "flags, plain",
    [
        ([], True),
        (["--searcher", "plain", "--policy", "../base"], True),
        (["--policy", "../base"], False),
        (["--searcher", "policy"], False),
    ],
)
def test_who_searches(work, monkeypatch, flags, plain):
    """A policy that is named searches, or else the plain searcher, unless --searcher decides."""
    ask_for_many(1)
    calls = []

    def spied(*arguments, **options):
        calls.append(arguments)
        return search_plainly(*arguments, **options)

    monkeypatch.setattr("minizs.imitation.stage1.search_plainly", spied)
    limits = ["--max_turn_tokens", "16", "--max_context", "160"]
    try:
        simulator(*COLLECT, *BM25_FLAGS, *limits, *flags, "--output", "out")
    except UserError as error:  # the tiny policy knows no word of these questions
        assert not plain and "both useful and noisy" in str(error)
    assert bool(calls) == plain


def retriever(queries: list[str], alive):
    """Answers as Search-R1's server does, until `alive` is exhausted, and notes the queries. Its
    corpus lacks a third of the births, so that some replies are of no use."""
    lines = Path("../corpus.txt").read_text().splitlines()
    documents = [line for line in lines if "Mirka" not in line]

    def answer(path, body, headers):
        if next(alive, None) is None:
            return 503, ""
        queries.extend(body["queries"])
        requests = [SearchRequest(query) for query in body["queries"]]
        replies = BM25(documents, body["topk"]).search(requests)
        return 200, {"result": [[{"contents": text} for text in reply] for reply in replies]}

    return answer


def test_a_collection_whose_engine_died_goes_on_with_the_advised_command(work, monkeypatch):
    """The command works in a folder whose name has a space, ends with the rows of an unbroken
    collection, and repeats no more queries than the few that lie between two writes."""
    monkeypatch.setattr("minizs.engines.client.FIRST_WAIT", 0.001)
    rows = [json.loads(line) for line in Path("../questions.jsonl").read_text().splitlines()]
    rows = [row | {"question": f"{i} {row['question']}"} for i in range(16) for row in rows]
    Path("many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [*COLLECT, "--engine", "http", "--retries", "1"]
    whole, first, second = [], [], []
    with serving(retriever(whole, iter(range(10**6)))) as (url, seen):
        simulator(*flags, "--engine_url", url, "--output", "whole")
        requests = len(seen)
    # It dies between two requests of one batch of questions.
    with serving(retriever(first, iter(range(requests // 2)))) as (url, _):
        with pytest.raises(UserError, match="answered 503.* is saved") as error:
            simulator(*flags, "--engine_url", url, "--output", "my runs/collected")
    assert first and not Path("my runs/collected").exists()
    message = str(error.value)
    assert "'my runs/collected' --resume" in message
    with serving(retriever(second, iter(range(10**6)))) as (url, _):
        out = run_advice(f"{message} --engine_url {url}")  # a server may have moved
    assert "The examples are in my runs/collected/collected.jsonl" in out
    assert rows_in("my runs/collected") == rows_in("whole")
    assert {*first, *second} == {*whole}
    assert len({*first} & {*second}) <= BETWEEN_WRITES < len({*first}) < len({*whole})
    assert not Path("my runs/collected.partial").exists()


def test_a_stopped_collection_goes_on_with_the_advised_command(work, monkeypatch):
    """Ctrl-C between two batches loses nothing, and the command goes on after the last one."""
    ask_for_many()
    flags = [*COLLECT, *BM25_FLAGS, "--examples", "300"]
    simulator(*flags, "--output", "whole")
    batches = iter(range(100))

    def stopped(*arguments, **options):
        if next(batches) == 2:
            raise KeyboardInterrupt
        return search_plainly(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("minizs.imitation.stage1.search_plainly", stopped)
        with pytest.raises(SystemExit, match="Stopped. What was collected is saved") as stop:
            simulator(*flags, "--output", "my runs/out")
    assert 0 < len(rows_in("my runs/out.partial")) < len(rows_in("whole"))
    out = run_advice(str(stop.value))
    assert "Going on after 128 questions" in out
    assert rows_in("my runs/out") == rows_in("whole")


def test_the_same_command_goes_on_too(work, monkeypatch):
    """It needs no --resume; other settings are refused, and --overwrite begins anew."""
    ask_for_many()
    flags = [*COLLECT, *BM25_FLAGS, "--examples", "300", "--output", "out"]
    batches = iter(range(100))

    def stopped(*arguments, **options):
        if next(batches) == 1:
            raise KeyboardInterrupt
        return search_plainly(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("minizs.imitation.stage1.search_plainly", stopped)
        with pytest.raises(SystemExit):
            simulator(*flags)
    before = everything(work / "out.partial")
    with pytest.raises(UserError, match="--seed was 0 and is 1"):
        simulator(*flags, "--seed", "1")
    assert everything(work / "out.partial") == before
    simulator(*flags)
    simulator(*flags[:-1], "anew", "--overwrite")
    assert rows_in("out") == rows_in("anew")


def test_a_used_output_is_refused_with_advice_that_works(work, capsys):
    """A finished collection is not written over: the sentence advises what helps, and both of its
    advices do. --resume finds that all is done."""
    ask_for_many(4)
    flags = [*COLLECT, *BM25_FLAGS, "--examples", "20"]
    simulator(*flags, "--output", "out")
    rows = rows_in("out")
    with pytest.raises(UserError) as error:
        simulator(*flags, "--output", "out", "--seed", "1")
    message = str(error.value)
    assert "another --output" in message and "--overwrite" in message
    assert "--resume" not in message and rows_in("out") == rows
    simulator(*flags, "--output", "other", "--seed", "1")
    simulator(*flags, "--output", "out", "--seed", "1", "--overwrite")
    assert rows_in("out") == rows_in("other") != rows
    capsys.readouterr()
    train_sim.main(["--output", "out", "--collect", "--resume"])
    assert capsys.readouterr().out.startswith("The collection is in out already")


def test_a_folder_of_others_is_left_alone(work):
    """Where the output holds something else, --overwrite is not advised: it would be refused."""
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("mine")
    refused(simulator, "--output notes", "give another --output.", work)
    refused(simulator, "--output notes --overwrite", "leaves it alone", work)


def test_a_collection_that_another_run_made_meanwhile(work, monkeypatch, capsys):
    """It is taken as it is: nothing is asked a second time."""

    def late(*arguments):
        Path("run").mkdir()
        Path("run/collected.jsonl").write_text("")

    monkeypatch.setattr("minizs.imitation.stage1.build_sources", late)
    simulator("--collect", *FILE, "--output", "run")
    assert "Another run has made run meanwhile." in capsys.readouterr().out


def test_nothing_to_go_on_with(work):
    """A mistyped output is no new run with default settings."""
    for flags in ("--resume --output mistyped", "--resume", "--collect --resume --output mistyped"):
        with pytest.raises(UserError, match="nothing to go on with in .*check --output"):
            train_sim.main(flags.split())
    assert not list(work.iterdir())


def test_an_engine_that_is_not_there_leaves_nothing_behind(work, monkeypatch):
    """No folder is made before the first reply can be expected."""
    monkeypatch.setattr("minizs.engines.client.FIRST_WAIT", 0.001)
    ask_for_many(1)
    flags = f"{' '.join(COLLECT)} --engine http --engine_url http://127.0.0.1:9 --retries 0"
    with pytest.raises(UserError, match="127.0.0.1:9"):
        simulator(*flags.split(), "--output", "out")
    assert {path.name for path in work.iterdir()} == {"many.jsonl"}
