"""Stage 3 from end to end, through `main(argv)`, on a tiny model."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from scripts import EVAL, FILE, evaluation, everything, policy, refused, status, two_processes

import evaluate
from minizs import UserError, rollout
from minizs.runs import build, run_folder
from minizs.runs import evaluation as functions
from minizs.trajectory import Turn

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
    assert out["settings"]["questions"] == 31 and out["before"] is None


def test_it_is_greedy(work, monkeypatch):
    """Guards a test that samples (defect D5), the held-out one of training too."""
    seen = []

    class Decoder(rollout.Decoder):
        def __init__(self, *arguments, temperature: float, **options) -> None:
            seen.append(temperature)
            super().__init__(*arguments, temperature=temperature, **options)

    monkeypatch.setattr(rollout, "Decoder", Decoder)
    evaluation("--policy", "../base", "--questions", "2", "--output", "out.json")
    assert seen == [0.0]
    policy("--output", "run", "--steps", "1", "--eval_every", "1", "--eval_questions", "2")
    assert seen == [0.0, 1.0, 0.0]


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
    """Guards --engine_noise that reaches no engine."""
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
    evaluation(*FILE, "--before", "none")
    assert figures("runs/mine/evaluation-2.json")["before"] is None
    evaluation(*FILE, "--engine", "none")  # another test loses no other's figures
    assert figures("runs/mine/evaluation-3.json")["settings"]["engine"] == "none"
    assert figures("runs/mine/evaluation.json") == out


def test_markdown_and_every_answer_lie_beside_the_figures(work, capsys):
    """Guards a table that only the terminal shows, and figures that nobody can look into."""
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
def asked(work, monkeypatch) -> list:
    """Every question that is put to a model, here of a copy of `base` in `mine`."""
    seen, stopped, play = [], [], rollout.rollout

    def spied(policy, examples, **named):
        if len(seen) == 17 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        seen.extend(named["keys"])
        return play(policy, examples, **named)

    shutil.copytree("../base", "mine")
    monkeypatch.setattr(rollout, "rollout", spied)
    return seen


def test_a_killed_evaluation_goes_on(work, asked):
    """Guards an engine that is paid twice, and figures that hang on an interruption."""
    with pytest.raises(KeyboardInterrupt):
        evaluation(*ANSWERED, "--output", "out.json")  # amid the second of two models
    assert not Path("out.json").exists()
    evaluation(*ANSWERED, "--output", "out.json", "--batch", "9")
    assert asked == [(i,) for _ in range(2) for i in range(9)]  # none of them twice
    evaluation(*ANSWERED, "--output", "whole.json")
    killed, whole = figures(), figures("whole.json")
    assert killed.pop("settings") != whole.pop("settings") and killed == whole
    ends = ("before.jsonl", "json", "jsonl", "md")
    names = [f"{name}.{end}" for name in ("out", "whole") for end in ends]
    assert sorted(path.name for path in work.iterdir()) == ["mine", *names]


@pytest.mark.parametrize("other", ["--seed 1", "--max_turns 2", "--engine_noise 1", "again", ""])
def test_answers_of_another_test_are_not_taken(work, asked, other):
    """Guards figures that are put together from two settings, or from two trainings' policies."""
    with pytest.raises(KeyboardInterrupt):
        evaluation(*ANSWERED, "--output", "out.json")
    flags = other.split()
    if other == "again":  # the policy has been trained and saved once more
        os.utime("mine/model.safetensors", (1, 1))
        flags = []
    evaluation(*ANSWERED, "--output", "out.json", *flags)
    assert len(asked) == 18 + (17 if other else 0)


@pytest.mark.parametrize("method", ["direct", "cot", "rag"])
def test_baselines(work, method, capsys, monkeypatch):
    """Guards a baseline that searches by itself, asks the engine often, or writes over others."""
    shutil.copytree("../base", "mine")
    searched, build_engine = [], build.build_engine

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
    """Guards rows that are lost, counted twice or answered otherwise by a second process."""
    flags = ["--policy", "../base", *FILE, "--temperature", "1", "--batch", "3"]
    text = two_processes("evaluate.py", *EVAL, *flags, "--output", "two.json")
    evaluation(*flags, "--output", "one.json")
    assert text.count("The figures are in two.json") == 1
    assert Path("two.jsonl").read_text() == Path("one.jsonl").read_text()
    one, two = figures("one.json"), figures("two.json")
    assert one.pop("settings") != two.pop("settings") and one == two


def test_no_file_beside_the_figures_is_lost(work):
    """Guards the questions themselves, `nq.jsonl` beside `nq.json`, and a table of that name."""
    for name, more, words in (
        ("nq.jsonl", [], "nq.jsonl exists"),
        ("nq.md", [], "nq.md exists"),
        ("nq.jsonl", ["--overwrite"], "is read"),
    ):
        shutil.copy("../questions.jsonl", name)
        with pytest.raises(UserError, match=words):
            evaluation(
                "--data",
                "./nq.jsonl" if more else FILE[1],
                *FILE[2:],
                *more,
                "--policy",
                "../base",
                "--output",
                "nq.json",
            )
        assert Path(name).read_text() == Path("../questions.jsonl").read_text()
        Path(name).unlink()


def test_where_figures_go_and_what_a_run_is(work):
    """Guards a folder that is not there (a hub name's), and any config.yaml taken for a run's."""
    assert evaluate.default_output("org/name") == Path("evaluation.json")
    for text in ("policy: here", "policy: [1]", "model: x", "- x", "a: b: c", ""):
        (work / "config.yaml").write_text(text)
        assert run_folder.started_from(work / "policy") == "none"
    (work / "config.yaml").write_text("policy: here")
    (work / "metrics.jsonl").touch()
    assert run_folder.started_from(work / "policy") == "here"


def test_without_a_run_one_is_made(work, monkeypatch):
    """Guards a first command that fails; stage 2 made before the arguments are looked at."""
    made = []

    def run_stage(*command):
        made.append(command)
        shutil.copytree("../base", "runs/policy-1/policy")

    monkeypatch.setattr(build, "run_stage", run_stage)
    with pytest.raises(UserError):
        evaluation("--data", "../nowhere.jsonl")
    for flags in (["--before", "../nowhere"], ["--engine", "web"]):
        with pytest.raises(UserError):
            evaluation(*flags)
    assert not made
    evaluation(*FILE)
    assert len(made) == 1 and "train_policy.py" in made[0]
    assert figures("runs/policy-1/evaluation.json")["overall"]["n"] == 9


def test_weights_are_read_before_a_simulator_is_made(work, bad, monkeypatch):
    """Guards answers that are lost to the other policy's broken weights."""
    monkeypatch.setattr(build, "make_default_simulator", lambda: 1 / 0)
    refused(
        evaluation,
        "--policy ../base --before ../bad/garbled --engine simulator",
        "cannot be loaded",
        work.parent,
    )


def test_questions_are_spread_over_the_sources(work):
    """Guards a benchmark of the first data set alone, where a file holds one after the other."""
    rows = [{"question": f"q{i}?", "answer": "x", "data_source": "abbbc"[i]} for i in range(5)]
    (work / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation("--policy", "../base", "--data", "q.jsonl", "--engine", "none", "--questions", "4")
    out = figures("../evaluation.json")
    assert [out[name]["n"] for name in "abc"] == [1, 2, 1]


def test_a_question_is_answered_as_it_unfolds(work, capsys, monkeypatch):
    """Guards --ask that shows the end alone, or not what was thought, or writes a file."""
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


def test_ask_needs_nothing_but_the_repository(work, capsys, monkeypatch):
    """Guards a question that starts a training, and documents of one's own that need --data."""
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
    evaluate.show_turn(replace(turn, documents=None))
    if turn.documents is not None:
        evaluate.show_turn(turn)


def test_every_kind_of_turn_is_shown(capsys):
    """Guards thoughts, empty replies and invalid turns that nobody sees."""
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
    """Guards escapes in a file, or where NO_COLOR is set; a colour that never ends."""
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
    """Guards a document that clears the screen, or writes over what stands there."""
    unfold(Turn(f"<think>{text}</think>", "search", text, [text, "naïve 日本 😀"]))
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out) and "    naïve 日本 😀\n" in out


def test_a_test_of_a_runs_policy_joins_its_page(work):
    """Guards a page that never shows what training changed, and failed searches nobody sees."""
    policy("--output", "run")
    evaluation("--policy", "run/policy", *FILE)
    html = Path("run/report.html").read_text()
    assert html.count("Before training") == 9 and "before and after 9</label>" in html
    assert figures("run/evaluation.json")["overall"]["search_errors"] == 0


def test_failed_searches_are_counted(work, monkeypatch):
    """Guards a dead engine that looks like one without documents, and counts of another model."""

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
    """Guards a first run that asks for something that the user has never heard of."""
    asked = []

    def made():
        asked.append(1)
        return "../base"

    monkeypatch.setattr(build, "make_default_simulator", made)
    evaluation("--policy", "../base", *FILE, "--engine", "simulator", "--output", "out.json")
    evaluation("--policy", "../base", *FILE, "--output", "two.json")
    assert asked == [1]


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
    """Guards tracebacks, minutes spent before a typo shows, and files left behind."""
    flags += "" if "--output" in flags else " --output out.json"
    refused(evaluation, flags, names, work.parent)


def test_bad_input_is_one_line_in_a_process(work):
    """Guards the exit status that a shell script looks at, and noise around the one sentence."""
    result = status("evaluate.py", "--questions", "-1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --questions must be 0 or more.\n"
