"""Stage 3 from end to end, through `main(argv)`, on a tiny model."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from accelerate import Accelerator
from scripts import EVAL, FILE, ROOT, evaluation, everything, policy, refused, status, two_processes

import evaluate
from minizs import UserError, rollout
from minizs.evaluation import outputs, stage3
from minizs.runs import build, data, run_folder, terminal
from minizs.runs.settings import EvalConfig, PolicyConfig
from minizs.trajectory import Example, Turn

KEYS = """f1 em sub_em f1_stderr em_stderr sub_em_stderr n searches_per_question""".split()


def figures(path="out.json") -> dict:
    with open(path) as file:
        return json.load(file)


def test_the_file_holds_every_data_set_and_their_means(work):
    """Figures and errors for each data set, for all questions pooled, and the data sets' mean."""
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
    assert out["settings"]["questions"] == 31 and out["before"] is None


def test_it_is_greedy(work, monkeypatch):
    """A test samples nothing, and neither does the held-out one of training."""
    seen = []

    class Decoder(rollout.Decoder):
        def __init__(self, *arguments, temperature: float, **options) -> None:
            seen.append(temperature)
            super().__init__(*arguments, temperature=temperature, **options)

    monkeypatch.setattr(rollout, "Decoder", Decoder)
    evaluation("--policy", "../base", "--questions", "2", "--output", "out.json")
    assert seen == [0.0]
    policy("--output", "run", "--steps", "1", "--eval_every", "1", "--eval_questions", "2")
    assert seen == [0.0, 1.0, 0.0, 0.0]  # the clean test of training and the noisy one


def test_standard_errors_by_hand(work, monkeypatch):
    """The sample deviation over the root of n; of the average, the root of the summed squares."""
    rows = []
    table = stage3.table
    monkeypatch.setattr(stage3, "table", lambda all: (rows.extend(all), table(all))[1])
    evaluation("--policy", "../base", *FILE, "--output", "out.json", "--temperature", "1")
    em = [float(row.answer == row.example.answers[0]) for row in rows]
    mean = sum(em) / len(em)
    n = len(em)
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
    """The named engine answers the searches; of a simulator it is said that it knows the golds."""
    rows = []
    table = stage3.table
    monkeypatch.setattr(stage3, "table", lambda all: (rows.extend(all), table(all))[1])
    evaluation(
        "--policy",
        "../base",
        *FILE,
        "--engine",
        engine,
        "--simulator",
        "../base",
        "--output",
        "out.json",
        "--temperature",
        "1",
    )
    text = capsys.readouterr().out
    assert ("has seen the gold answers" in text) == (engine == "simulator")
    replies = [turn.documents for row in rows for turn in row.turns if turn.documents is not None]
    assert replies
    if engine == "none":
        assert not any(replies)
    else:
        assert any("was born on" in text for reply in replies for text in reply)


def test_noise_takes_the_answers_out(work, monkeypatch):
    """With --engine_noise 1 no reply holds a gold answer."""
    seen = []
    build_engine = build.build_engine

    class Spied:
        def __init__(self, *args):
            self.engine = build_engine(*args)

        def search(self, requests):
            replies = self.engine.search(requests)
            seen.extend(zip(requests, replies, strict=True))
            return replies

    monkeypatch.setattr(build, "build_engine", Spied)
    evaluation(
        "--policy",
        "../base",
        *FILE,
        "--output",
        "out.json",
        "--engine_noise",
        "1",
        "--temperature",
        "1",
    )
    assert seen and all(request.noisy for request, _ in seen)
    assert not any(r.answers[0] in text for r, reply in seen for text in reply)


NOISY_FLAGS = ["--before", "../base", *FILE, "--temperature", "1", "--output", "out.json"]


def test_a_second_test_has_noisy_replies(work, capsys):
    """By default half of the replies in a second test are noisy: its F1 is the last column, its
    figures and answers have places of their own, and the first test stays what it is."""
    shutil.copytree("../base", "mine")
    evaluation("--policy", "mine", *NOISY_FLAGS, "--eval_noise", "1")
    text = capsys.readouterr().out
    assert "F1, 100% noisy |" in text and "In the last column 100% of the replies" in text
    both = figures()
    names = "mine out.before.jsonl out.before.noisy.jsonl out.json out.jsonl out.md out.noisy.jsonl"
    assert sorted(path.name for path in work.iterdir()) == names.split()
    for name, noisy in (("out.jsonl", False), ("out.noisy.jsonl", True)):
        rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
        turns = [turn for row in rows for turn in row["turns"] if turn["documents"]]
        golds = [row["example"]["answers"][0] for row in rows]
        assert turns and all(turn["noisy"] == noisy for turn in turns) and len(rows) == 9
        held = [any(gold in str(turn["documents"]) for gold in golds) for turn in turns]
        assert any(held) or noisy
    assert (
        set(KEYS) <= both["noisy"]["overall"].keys() == both["overall"].keys() - {"search_errors"}
    )
    assert both["noisy"]["overall"]["n"] == both["before"]["noisy"]["overall"]["n"] == 9
    evaluation("--policy", "mine", *NOISY_FLAGS, "--eval_noise", "0", "--overwrite")
    assert "noisy" not in capsys.readouterr().out
    once = figures()
    for one, two in ((once, both), (once["before"], both["before"])):
        assert "noisy" not in one and two.pop("noisy")
    assert once.pop("settings") != both.pop("settings") and once == both


def test_a_killed_noisy_test_goes_on(work, questions_put):
    """The same command asks only what has no answer yet, in both tests."""
    flags = ["--policy", "mine", *NOISY_FLAGS, "--batch", "2", "--eval_noise", "0.5"]
    with pytest.raises(KeyboardInterrupt):
        evaluation(*flags)  # amid the second test of the first model
    evaluation(*flags)
    assert questions_put == [(i,) for _ in range(4) for i in range(9)]


@pytest.mark.parametrize(
    "flags", ["--engine none", "--engine simulator --simulator ../base", "--engine_noise 0.5"]
)
def test_there_is_no_second_test_where_it_means_nothing(work, capsys, flags):
    """Without BM25, or where the one test is noisy, it is left out; a user who asks for it is told
    so."""
    common = ["--policy", "../base", "--before", "none", *FILE, *flags.split()]
    evaluate.main([*EVAL[:-2], *common, "--output", "a.json"])
    assert "eval_noise" not in capsys.readouterr().out and "noisy" not in figures("a.json")
    evaluation(*common, "--eval_noise", "0.5", "--output", "b.json")
    assert "--eval_noise has no effect here" in capsys.readouterr().out
    assert "noisy" not in figures("b.json")


def test_a_runs_policy_stands_beside_what_it_began_as(work, capsys):
    """By default the newest run's policy and its base; each test has files of its own."""
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
    evaluation(*FILE, "--before", "none")
    assert figures("runs/mine/evaluation-2.json")["before"] is None
    evaluation(*FILE, "--engine", "none")  # another test loses no other's figures
    assert figures("runs/mine/evaluation-3.json")["settings"]["engine"] == "none"
    assert figures("runs/mine/evaluation.json") == out


def test_markdown_and_every_answer_lie_beside_the_figures(work, capsys):
    """The table lies in OUT.md, every answer in OUT.jsonl and OUT.before.jsonl."""
    evaluation("--policy", "../base", *FILE, "--before", "tiny", "--output", "out.json")
    names = ["out.before.jsonl", "out.json", "out.jsonl", "out.md"]
    assert sorted(everything(work)) == names
    table = Path("out.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n| tiny |") == 4
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(9))
    em = [row["answer"] in row["example"]["answers"] for row in rows]
    assert figures()["overall"]["em"] == pytest.approx(sum(em) / 9)
    evaluation("--policy", "../base", *FILE, "--before", "../base", "--output", "self.json")
    assert figures("self.json")["before"]["overall"] == figures("self.json")["overall"]


ANSWERED = ["--policy", "mine", "--before", "../base", *FILE, "--temperature", "1", "--batch", "2"]


@pytest.fixture
def questions_put(work, monkeypatch) -> list:
    """The keys of all questions that are put to a model, here a copy of `base` in `mine`. At the
    18th the user presses Ctrl-C, once."""
    seen = []
    stopped = []
    play = stage3.rollout

    def spied(policy, examples, **named):
        if len(seen) == 17 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        seen.extend(named["keys"])
        return play(policy, examples, **named)

    shutil.copytree("../base", "mine")
    monkeypatch.setattr(stage3, "rollout", spied)
    return seen


def test_a_killed_evaluation_goes_on(work, questions_put):
    """The same command asks only what has no answer yet, and gives the figures of a whole test."""
    with pytest.raises(KeyboardInterrupt):
        evaluation(*ANSWERED, "--output", "out.json")  # amid the second of two models
    assert not Path("out.json").exists()
    evaluation(*ANSWERED, "--output", "out.json", "--batch", "9")
    assert questions_put == [(i,) for _ in range(2) for i in range(9)]  # none of them twice
    evaluation(*ANSWERED, "--output", "whole.json")
    killed, whole = figures(), figures("whole.json")
    assert killed.pop("settings") != whole.pop("settings") and killed == whole
    ends = ("before.jsonl", "json", "jsonl", "md")
    names = [f"{name}.{end}" for name in ("out", "whole") for end in ends]
    assert sorted(path.name for path in work.iterdir()) == ["mine", *names]


@pytest.mark.parametrize("other", ["--seed 1", "--max_turns 2", "--engine_noise 1", "again", ""])
def test_answers_of_another_test_are_not_taken(work, questions_put, other):
    """Answers of other settings, or of weights that were saved anew, are not taken."""
    with pytest.raises(KeyboardInterrupt):
        evaluation(*ANSWERED, "--output", "out.json")
    flags = other.split()
    if other == "again":  # the policy has been trained and saved once more
        os.utime("mine/model.safetensors", (1, 1))
        flags = []
    evaluation(*ANSWERED, "--output", "out.json", *flags)
    assert len(questions_put) == 18 + (17 if other else 0)


@pytest.mark.parametrize("method", ["direct", "cot", "rag"])
def test_baselines(work, method, capsys, monkeypatch):
    """Only rag searches, once for all questions; --ask shows a baseline as well."""
    shutil.copytree("../base", "mine")
    searched = []
    build_engine = build.build_engine

    def spied(*arguments):
        engine = build_engine(*arguments)
        search = engine.search
        engine.search = lambda requests: searched.append(len(requests)) or search(requests)
        return engine

    monkeypatch.setattr(build, "build_engine", spied)
    evaluation("--policy", "mine", *FILE, "--method", method)
    assert searched == ([9] if method == "rag" else [])
    out = figures("evaluation.json")
    assert out["overall"]["n"] == 9 and out["settings"]["method"] == method
    assert out["overall"]["searches_per_question"] == (method == "rag")
    capsys.readouterr()
    evaluation("--policy", "mine", *FILE, "--method", method, "--ask", "when was Fota Jourer born?")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "question when was Fota Jourer born?" and lines[-1].startswith("answer   ")
    assert ("was born on" in "".join(lines[2:])) == (method == "rag")


def test_two_processes_find_what_one_finds(work):
    """Two processes write the same figures and answers as one."""
    flags = ["--policy", "../base", *FILE, "--temperature", "1", "--batch", "3"]
    text = two_processes("evaluate.py", *EVAL, *flags, "--output", "two.json")
    evaluation(*flags, "--output", "one.json")
    assert text.count("The figures are in two.json") == 1
    assert Path("two.jsonl").read_text() == Path("one.jsonl").read_text()
    one, two = figures("one.json"), figures("two.json")
    assert one.pop("settings") != two.pop("settings") and one == two


def test_no_file_beside_the_figures_is_lost(work):
    """Nothing beside OUT.json is lost: neither the questions, `nq.jsonl`, nor a table."""
    for name, flags, words in (
        ("nq.jsonl", [], "nq.jsonl exists"),
        ("nq.md", [], "nq.md exists"),
        ("nq.jsonl", ["--overwrite"], "would overwrite nq.jsonl, which is read"),
    ):
        shutil.copy("../questions.jsonl", name)
        with pytest.raises(UserError, match=words):
            evaluation(
                "--data",
                "./nq.jsonl" if flags else FILE[1],
                *FILE[2:],
                *flags,
                "--policy",
                "../base",
                "--output",
                "nq.json",
            )
        assert Path(name).read_text() == Path("../questions.jsonl").read_text()
        Path(name).unlink()


def test_without_a_run_one_is_made(work, monkeypatch):
    """The first run is made at need, and only once the arguments are sound."""
    commands = []

    def run_stage(*command):
        commands.append(command)
        shutil.copytree("../base", "runs/policy-1/policy")

    monkeypatch.setattr(build, "run_stage", run_stage)
    with pytest.raises(UserError):
        evaluation("--data", "../nowhere.jsonl")
    for flags in (["--before", "../nowhere"], ["--engine", "web"]):
        with pytest.raises(UserError):
            evaluation(*flags)
    assert not commands
    evaluation(*FILE)
    assert len(commands) == 1 and "train_policy.py" in commands[0]
    assert figures("runs/policy-1/evaluation.json")["overall"]["n"] == 9


def test_weights_are_read_before_a_simulator_is_made(work, bad, monkeypatch):
    """Both policies are loaded before anything expensive is made for them."""
    monkeypatch.setattr(build, "make_default_simulator", lambda: 1 / 0)
    refused(
        evaluation,
        "--policy ../base --before ../bad/garbled --engine simulator",
        "cannot be loaded",
        work.parent,
    )


def test_questions_are_spread_over_the_sources(work):
    """--questions takes the data sets in turn, also where a file holds one after the other."""
    rows = [{"question": f"q{i}?", "answer": "x", "data_source": "abbbc"[i]} for i in range(5)]
    (work / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation("--policy", "../base", "--data", "q.jsonl", "--engine", "none", "--questions", "4")
    out = figures("../evaluation.json")
    assert [out[name]["n"] for name in "abc"] == [1, 2, 1]


def test_a_question_is_answered_as_it_unfolds(work, capsys, monkeypatch):
    """--ask shows every turn and its documents, and writes nothing."""
    flags = ["--policy", "../base", *FILE, "--temperature", "1"]
    for seed in range(20):  # until the policy happens to search and answer
        evaluation(*flags, "--ask", "when was Fota Jourer born?", "--seed", str(seed))
        text = capsys.readouterr().out
        if "</search>" in text and "</answer>" in text:
            break
    lines = text.splitlines()
    assert lines[0] == "question when was Fota Jourer born?" and lines[-1].startswith("answer   ")
    search = next(i for i, line in enumerate(lines) if "</search>" in line)
    assert "was born on" in lines[search + 1] and lines[search + 1].startswith("    ")
    assert not everything(work)


def test_ask_says_why_there_is_no_answer(work, capsys):
    """The limit that the answer ran into, by the name of its flag."""
    ask = ["--policy", "../base", "--ask", "when was Fota Jourer born?"]
    evaluation(*ask, "--max_turn_tokens", "1")
    assert capsys.readouterr().out.endswith("answer   none: it ended at --max_turn_tokens 1\n")


def test_ask_needs_nothing_but_the_repository(work, capsys, monkeypatch):
    """--ask trains nothing, and takes --corpus without --data."""
    monkeypatch.setattr(build, "run_stage", None)
    evaluate.main(["--ask", "where was Holo Trelmow born?", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("No run is finished yet") and lines[1].startswith("question")
    assert lines[2].startswith("<think>") and lines[-1].startswith("answer")
    evaluation(
        "--policy",
        "../base",
        "--corpus",
        "../corpus.txt",
        "--method",
        "rag",
        "--ask",
        "when was Fota Jourer born?",
    )
    assert "    Fota Jourer was born on January\n" in capsys.readouterr().out


TURNS = [
    Turn("<think>a</think> <search>b</search>", "search", "b", ["c", "d"]),
    Turn("<search>b</search>", "search", "b", [], noisy=True),
    Turn("hm", "invalid", ""),
    Turn("<answer></answer>", "answer", ""),
]


def unfold(turn: Turn) -> None:
    """As a rollout shows it: as it is written, and again when documents are there."""
    terminal.show_turn(replace(turn, documents=None))
    if turn.documents is not None:
        terminal.show_turn(turn)


def test_every_kind_of_turn_is_shown(capsys):
    """Thoughts, searches, answers, empty replies and invalid turns can all be seen."""
    for turn in TURNS:
        unfold(turn)
    assert capsys.readouterr().out.splitlines() == [
        "<think>a</think> <search>b</search>",
        "    c",
        "    d",
        "<search>b</search>",
        "    nothing found",
        "hm",
        "    no valid action",
        "<answer></answer>",
    ]


def test_a_terminal_gets_colours_unless_they_are_not_wished(capsys, monkeypatch):
    """Every colour ends; none is written into a file, or where NO_COLOR is set."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for plain in ("", "1"):
        monkeypatch.setenv("NO_COLOR", plain)
        for turn in TURNS:
            unfold(turn)
        text = capsys.readouterr().out
        assert text.count("\033[0m") == (0 if plain else 8) and text.count("\033[") in (0, 16)
        assert plain or "\033[33mnothing found\033[0m" in text and "\033[36m<search>b" in text


@pytest.mark.parametrize("text", ["\033[2J\033[1;1H", "\x9b31m", "a\rb", "\u202e", "\ud800"])
def test_documents_do_not_drive_the_terminal(capsys, text):
    """What would clear the screen, or write over what stands there, is shown as a mark."""
    unfold(Turn(f"<think>{text}</think>", "search", text, [text, "naïve 日本 😀"]))
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out) and "    naïve 日本 😀\n" in out


def test_a_test_of_a_runs_policy_joins_its_page(work):
    """The page of a run shows its test; the figures count the searches that failed."""
    policy("--output", "run")
    evaluation("--policy", "run/policy", *FILE)
    html = Path("run/report.html").read_text()
    assert html.count("Before training") == 9 and "before and after 9</label>" in html
    assert re.search("<pre>.*^policy: ../base$", html, re.DOTALL | re.MULTILINE)  # the settings
    assert figures("run/evaluation.json")["overall"]["search_errors"] == 0


def test_failed_searches_are_counted(work, monkeypatch):
    """Each policy's table has the searches that failed while it was tested."""

    class Dead:
        failed = 0

        def search(self, requests):
            self.failed += len(requests)
            return [[] for _ in requests]

    monkeypatch.setattr(build, "build_engine", lambda *_: Dead())
    flags = ["--policy", "../base", "--before", "tiny", *FILE, "--method", "rag"]
    evaluation(*flags, "--output", "out.json")
    out = figures()
    assert out["overall"]["search_errors"] == out["before"]["overall"]["search_errors"] == 9


def test_the_simulator_is_made_when_it_is_needed(work, monkeypatch):
    """The default simulator is made where it is needed, and only there."""
    calls = []

    def make():
        calls.append(1)
        return "../base"

    monkeypatch.setattr(build, "make_default_simulator", make)
    evaluation("--policy", "../base", *FILE, "--engine", "simulator", "--output", "out.json")
    evaluation("--policy", "../base", *FILE, "--output", "two.json")
    assert calls == [1]


# ---- A policy remembers its training -------------------------------------------------------------


def remembering_policy(work: Path, **settings) -> Path:
    """A run whose policy says what it was trained with."""
    shutil.copytree("../base", "run/policy")
    config = PolicyConfig(policy="../base", max_turns=3, max_turn_tokens=16, max_context=160)
    run_folder.remember_training(Path("run/policy"), replace(config, **settings))
    return Path("run/policy")


def test_flags_that_are_silent_are_those_of_the_training(work, capsys):
    """Limits and the like are the policy's; what a flag says wins; what is taken is said."""
    remembering_policy(work, top_k=2)
    flags = ["--policy", "run/policy", "--questions", "2", "--threads", "1", "--before", "none"]
    evaluate.main([*flags, "--max_turns", "2"])
    settings = figures("run/evaluation.json")["settings"]
    assert (settings["max_turns"], settings["top_k"], settings["max_context"]) == (2, 2, 160)
    sentence = capsys.readouterr().out.splitlines()[0]
    taken = "--top_k 2, --max_turn_tokens 16, --max_context 160"
    assert sentence == f"As in its training, where no flag says otherwise: {taken}."
    Path("own.yaml").write_text("max_context: 150")
    evaluate.main([*flags, "--config", "own.yaml"])
    assert figures("run/evaluation-2.json")["settings"]["max_context"] == 150


def test_own_data_is_tested_on_what_was_held_out(work, capsys):
    """Without --data: the tenth that training left out, with its corpus, and that is said."""
    rows = [{"question": f"when was Fota {i} born?", "answer": "January"} for i in range(60)]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    remembering_policy(work, data="q.jsonl", corpus="../corpus.txt")
    flags = ["--policy", "run/policy", "--threads", "1"]
    evaluate.main(flags)
    out = figures("run/evaluation.json")
    held_out = sum(data.is_held_out(Example(row["question"], ())) for row in rows)
    assert out["overall"]["n"] == held_out and 0 < held_out < 30
    assert out["settings"]["corpus"] == "../corpus.txt" and out["before"] is not None
    text = capsys.readouterr().out
    assert "--data q.jsonl, --corpus ../corpus.txt" in text
    assert "on those of these questions that it was not trained on" in text
    evaluate.main([*flags, "--data", "q.jsonl"])  # all of them, where that is asked for
    assert figures("run/evaluation-2.json")["overall"]["n"] == 60
    assert "was trained on most of these questions" in capsys.readouterr().out
    evaluate.main([*flags, "--data", "world", "--questions", "4"])
    world = figures("run/evaluation-3.json")
    assert world["settings"]["corpus"] == "" and world["one_hop"]["n"] == 2
    evaluate.main([*flags, "--ask", "when was Fota Jourer born?", "--method", "rag"])
    assert "    Fota Jourer was born on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, flags, words",
    [
        ({"data": "gone.jsonl", "corpus": "../corpus.txt"}, "", "gone.jsonl, which is not here"),
        ({"data": "../questions.jsonl", "corpus": "gone.txt"}, "", "gone.txt, which is not here"),
        ({"data": "../questions.jsonl"}, "", "needs --corpus"),
        ({"data": "../questions.jsonl"}, "--ask who?", "without a corpus: give --corpus"),
        ({"data": "few.jsonl", "corpus": "../corpus.txt"}, "", "none of its questions was held"),
    ],
)
def test_what_a_training_had_and_a_test_lacks(work, settings, flags, words):
    """One sentence says what is missing and which flag gives it, instead of another test."""
    Path("few.jsonl").write_text('{"question": "who is it?", "answer": "x"}')
    remembering_policy(work, **settings)
    refused(evaluation, f"--policy run/policy {flags}", words, work)


def test_a_corpus_that_is_not_needed(work):
    """Another engine than BM25 reads no corpus, so that of the training need not be there."""
    remembering_policy(work, data="../questions.jsonl", corpus="gone.txt")
    flags = ["--policy", "run/policy", "--data", "../questions.jsonl", "--engine", "none"]
    evaluation(*flags)
    assert figures("run/evaluation.json")["overall"]["n"] == 9


def test_a_base_that_is_gone(work, capsys):
    """A run that was moved is tested alone, and that is said."""
    remembering_policy(work, policy="../moved/base")
    evaluation("--policy", "run/policy", "--questions", "2")
    assert "tested alone. There is no model folder '../moved/base'" in capsys.readouterr().out
    assert figures("run/evaluation.json")["before"] is None


def test_the_first_line_says_which_run_is_tested(work, capsys):
    """Without --policy: which run, how many steps it has, and when it ended."""
    policy("--output", "runs/policy-1")
    when = datetime.fromtimestamp(Path("runs/policy-1", run_folder.DONE).stat().st_mtime)
    capsys.readouterr()
    evaluation("--questions", "2", "--data", "world")
    first = capsys.readouterr().out.splitlines()[0]
    expected = f"the newest run, runs/policy-1: 2 steps, ended on {when:%Y-%m-%d at %H:%M}."
    assert first == f"The policy is that of {expected}"


# ---- Figures that mean little, and names that are claimed ----------------------------------------


def test_a_useless_test_says_why(work, capsys):
    """Under the table, in OUT.md and in OUT.json: the share, the limit and what to raise."""
    flags = ["--policy", "../base", "--questions", "4", "--output", "out.json"]
    evaluation(*flags, "--max_turn_tokens", "2")
    sentence = (
        "../base: 100% of the questions have no answer since a limit was reached, all of them at "
        "--max_turn_tokens 2: raise it."
    )
    assert sentence in capsys.readouterr().out and sentence in Path("out.md").read_text()
    assert sentence in figures()["warnings"]


def test_two_evaluations_at_once_have_two_names(work):
    """The same command twice at once: two sets of files, with the same figures."""
    shutil.copytree("../base", "run/policy")
    command = [sys.executable, str(ROOT / "evaluate.py"), *EVAL, "--policy", "run/policy", *FILE]
    processes = [subprocess.Popen([*command, "--batch", "1"]) for _ in range(2)]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    names = sorted(path.name for path in Path("run").glob("evaluation*"))
    assert names == [
        f"evaluation{number}.{suffix}"
        for number in ("-2", "")
        for suffix in ("json", "jsonl", "md")
    ]
    first, second = figures("run/evaluation.json"), figures("run/evaluation-2.json")
    assert first.pop("settings") != second.pop("settings") and first == second


def test_a_claimed_name_is_refused(work):
    """Another evaluation's --output cannot be taken while it runs."""
    config = EvalConfig(policy="../base", output="out.json")
    with outputs.claimed_output(config, Accelerator(), "00000000"):
        with pytest.raises(UserError, match="Another evaluation is writing out.json"):
            evaluation("--policy", "../base", "--questions", "2", "--output", "out.json")
    evaluation("--policy", "../base", "--questions", "2", "--output", "out.json")


def test_a_name_that_was_used_meanwhile_is_refused(work):
    """What another evaluation finished between the first check and the claim is not lost."""
    Path("out.json").write_text("{}")
    config = EvalConfig(policy="../base", output="out.json")
    with pytest.raises(UserError, match="out.json exists; give another --output"):
        with outputs.claimed_output(config, Accelerator(), "00000000"):
            pass
    assert [path.name for path in work.iterdir()] == ["out.json"]


def test_default_names_and_interrupted_answers(work):
    """The first free name, or the one at which the same evaluation was interrupted."""
    shutil.copytree("../base", "run/policy")
    config = EvalConfig(policy="run/policy")

    def claim(fingerprint, interrupted=False) -> str:
        with outputs.claimed_output(config, Accelerator(), fingerprint) as output:
            (output.answers / f"{fingerprint}.jsonl.0").touch()
            if interrupted:
                raise KeyboardInterrupt
            output.figures.touch()
        return output.figures.name

    with pytest.raises(KeyboardInterrupt):
        claim("aaaaaaaa", interrupted=True)
    assert claim("bbbbbbbb") == "evaluation-2.json"
    assert claim("aaaaaaaa") == "evaluation.json"
    assert claim("cccccccc") == "evaluation-3.json"
    assert not list(Path("run").glob("*.unfinished"))


REFUSED = [
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
    ("--policy ../base --eval_noise 2", "--eval_noise"),
    ("--policy ../base --temperature -1", "--temperature"),
    ("--policy ../base --max_turn_tokens 0", "--max_turn_tokens"),
    ("--policy ../base --max_context 2048", "--max_context 2048"),
    ("--policy ../base --engine simulator --max_context 5", "--max_context 5"),
    ("--policy ../base --max_context 3 --ask why?", "--max_context 3"),
    ("--policy ../base --ask=", "--ask needs"),
    ("--policy ../base --output ../corpus.txt", "../corpus.txt"),
    ("--policy ../base --output ../nowhere/out.json", "../nowhere"),
    ("--policy ../base --output out.md", ".json"),
    ("--policy ../base --method oracle", "oracle"),
    ("--policy ../base --method rag --engine_noise 0.5", "--engine_noise"),
    ("--policy ../base --engine web", "SERPER_API_KEY"),
    ("--policy ../base --batch 0", "--batch"),
    ("--policy ../base --config ../bad/unknown.yaml", "stepz"),
]


@pytest.mark.parametrize("flags, names", REFUSED)
def test_bad_input_is_refused_before_anything_is_made(work, bad, flags, names):
    """One sentence that names what is wrong; nothing is written."""
    flags += "" if "--output" in flags else " --output out.json"
    refused(evaluation, flags, names, work.parent)


def test_bad_input_is_one_line_in_a_process(work):
    """Exit status 2, one line on stderr, and nothing on stdout."""
    result = status("evaluate.py", "--questions", "-1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --questions must be 0 or more, not -1.\n"
