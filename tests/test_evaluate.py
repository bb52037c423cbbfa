"""Stage 3 from end to end, through `main(argv)`, on a tiny model."""

import json
import math
import os
import shutil

import pytest
from scripts import FILE, evaluation, everything, policy, refused, status

import evaluate
from minizs import evaluation as functions
from minizs import stages

KEYS = """f1 em sub_em f1_stderr em_stderr sub_em_stderr n searches_per_question""".split()


def figures(path="out.json") -> dict:
    with open(path) as file:
        return json.load(file)


def test_the_file_holds_every_data_set_and_their_means(work):
    """Guards figures without errors, sets pooled where they should be averaged, lost questions."""
    evaluation("--policy", "../base", "--questions", "31", "--output", "out.json")
    out = figures()
    for name in ("one_hop", "two_hop", "overall", "average"):
        assert set(KEYS) <= out[name].keys()
    one, two, overall, average = (out[k] for k in ("one_hop", "two_hop", "overall", "average"))
    assert (one["n"], two["n"], overall["n"], average["n"]) == (16, 15, 31, 31)
    for name in ("f1", "searches_per_question"):
        pooled = (16 * one[name] + 15 * two[name]) / 31
        assert overall[name] == pytest.approx(pooled)
        assert average[name] == pytest.approx((one[name] + two[name]) / 2)
    assert out["settings"]["questions"] == 31 and "before" not in out


def test_standard_errors_by_hand(work, monkeypatch):
    """Guards a population deviation, or one over root n too few."""
    rows = []
    table = functions.table
    monkeypatch.setattr(functions, "table", lambda all: (rows.extend(all), table(all))[1])
    evaluation("--policy", "../base", *FILE, "--output", "out.json", "--temperature", "1")
    em = [float(row.answer == row.example.answers[0]) for row in rows]
    mean, n = sum(em) / len(em), len(em)
    assert n == 9 and 0 < mean < 1
    overall = figures()["overall"]
    assert overall["em"] == pytest.approx(mean)
    spread = math.sqrt(n * mean * (1 - mean) / (n - 1))  # of zeros and ones
    assert overall["em_stderr"] == pytest.approx(spread / math.sqrt(n))
    january, february = (figures()[name]["em_stderr"] for name in ("January", "February"))
    average = figures()["average"]["em_stderr"]
    assert average == pytest.approx(math.sqrt(january**2 + february**2) / 2)


@pytest.mark.parametrize("engine", ["none", "simulator", "bm25"])
def test_every_engine_answers(work, engine, capsys, monkeypatch):
    """Guards an engine that is named and not used, and a simulator passed off as a test."""
    rows = []
    table = functions.table
    monkeypatch.setattr(functions, "table", lambda all: (rows.extend(all), table(all))[1])
    evaluation("--policy", "../base", *FILE, "--engine", engine, "--simulator", "../base",
               "--output", "out.json", "--temperature", "1")  # fmt: skip
    text = capsys.readouterr().out
    assert ("has seen the gold answers" in text) == (engine == "simulator")
    replies = [turn.documents for row in rows for turn in row.turns if turn.documents is not None]
    assert replies
    if engine == "none":
        assert not any(replies)
    else:
        assert any("was born on" in text for reply in replies for text in reply)


def test_noise_takes_the_answers_out(work, monkeypatch):
    """Guards --engine_noise that reaches no engine."""
    seen = []
    engine_of = evaluate.engine_of

    class Spied:
        def __init__(self, config):
            self.engine = engine_of(config)

        def search(self, requests):
            replies = self.engine.search(requests)
            seen.extend(zip(requests, replies, strict=True))
            return replies

    monkeypatch.setattr(evaluate, "engine_of", Spied)
    evaluation("--policy", "../base", *FILE, "--output", "out.json", "--engine_noise", "1",
               "--temperature", "1")  # fmt: skip
    assert seen and all(request.noisy for request, _ in seen)
    assert not any(r.answers[0] in text for r, reply in seen for text in reply)


def test_a_runs_policy_stands_beside_what_it_began_as(work, capsys):
    """Guards a gain that nothing is compared with, a stale run, and figures that get lost."""
    policy("--seed", "1")
    policy("--seed", "2", "--output", "runs/mine")
    shutil.copytree(work / "runs" / "policy-1", work / "runs" / "policy-7")
    (work / "runs" / "policy-7" / "policy" / "prompt.txt").unlink()  # killed while it was saved
    os.utime(work / "runs" / "policy-1" / "policy" / "prompt.txt", (1, 1))
    capsys.readouterr()
    evaluation(*FILE)
    text = capsys.readouterr().out
    assert "../base" in text and "runs/mine/policy" in text
    out = figures("runs/mine/evaluation.json")
    assert out["settings"]["policy"] == "runs/mine/policy"
    assert out["before"]["overall"]["n"] == out["overall"]["n"] == 9
    evaluation(*FILE, "--before", "none")  # its own file may be written over
    assert "before" not in figures("runs/mine/evaluation.json")


def test_a_question_is_answered_as_it_unfolds(work, capsys, monkeypatch):
    """Guards --ask that shows the end alone, or compares, or writes a file."""
    flags = ["--policy", "../base", *FILE, "--temperature", "1"]
    for seed in range(20):  # until the policy happens to search and answer
        evaluation(*flags, "--ask", "when was Fota Jourer born?", "--seed", str(seed))
        lines = capsys.readouterr().out.splitlines()
        kinds = [line.split(" ")[0] for line in lines]
        if "search" in kinds and kinds[-1] == "answer":
            break
    assert lines[0] == "question when was Fota Jourer born?"
    search = kinds.index("search")
    assert "was born on" in lines[search + 1] and lines[-1].split()[1:]
    assert not everything(work)


def test_the_simulator_is_made_when_it_is_needed(work, monkeypatch):
    """Guards a first run that asks for something that the user has never heard of."""
    asked = []

    def made():
        asked.append(1)
        return "../base"

    monkeypatch.setattr(stages, "make_default_simulator", made)
    evaluation("--policy", "../base", *FILE, "--engine", "simulator", "--output", "out.json")
    evaluation("--policy", "../base", *FILE, "--output", "two.json")
    assert asked == [1]


REFUSED = [
    ("", "no finished run"),
    ("--policy ../base --polisy x", "--polisy"),
    ("--policy ../base --questions few", "--questions"),
    ("--policy ../base --questions -1", "--questions"),
    ("--policy ../base --engine google", "google"),
    ("--policy ../nowhere", "../nowhere"),
    ("--policy ../bad/untokenized", "no tokenizer"),
    ("--policy ../bad/garbled", "cannot be loaded"),
    ("--policy ../base --before ../nowhere", "../nowhere"),
    ("--policy ../base --engine simulator --simulator ../bad/empty", "config.json"),
    ("--policy ../base --data ../questions.jsonl", "--corpus"),
    ("--policy ../base --data ../questions.jsonl --corpus ../nowhere.txt", "../nowhere.txt"),
    ("--policy ../base --data ../questions.csv", "questions.csv"),
    ("--policy ../base --engine none --data ../bad/columns.jsonl", "'question'"),
    ("--policy ../base --engine_noise 2", "--engine_noise"),
    ("--policy ../base --temperature -1", "--temperature"),
    ("--policy ../base --max_turn_tokens 0", "--max_turn_tokens"),
    ("--policy ../base --max_context 2048", "--max_context 2048"),
    ("--policy ../base --engine simulator --max_context 5", "--max_context 5"),
    ("--policy ../base --max_context 3 --ask why?", "--max_context 3"),
    ("--policy ../base --output ../corpus.txt", "../corpus.txt"),
    ("--policy ../base --output ../nowhere/out.json", "../nowhere"),
    ("--policy ../base --config ../bad/unknown.yaml", "'stepz'"),
]


@pytest.mark.parametrize("flags, names", REFUSED)
def test_bad_input_is_refused_before_anything_is_made(work, bad, flags, names):
    """Guards tracebacks, minutes spent before a typo shows, and files left behind."""
    flags += "" if "--output" in flags else " --output out.json"
    refused(evaluation, flags, names, work.parent)


def test_bad_input_is_one_line_in_a_process(work):
    """Guards the exit status that a shell script looks at, and noise around the one sentence."""
    result = status("evaluate.py")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: There is no finished run")
    assert len(result.stderr.splitlines()) == 1
