"""Stage 1 from end to end, through `main(argv)`, on a tiny model."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import make_dataclass
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from counts import COUNTS
from filelock import FileLock
from scripts import (
    MONTHS,
    NAMES,
    ROOT,
    SIM,
    everything,
    refused,
    simulator,
    status,
    two_processes,
    weights,
)
from test_client import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_sim
from benchmarks import tiny_base as base
from minizs import collect, models, protocol, sft, stages
from minizs.config import UserError, option
from minizs.simulator import training_text

COLLECTED = "../collected/collected.jsonl"


@pytest.fixture(scope="module")
def collected(home):
    """The rows of a small `--collect`, in `collected/collected.jsonl`."""
    with pytest.MonkeyPatch.context() as patch:
        (home / "elsewhere").mkdir()
        patch.chdir(home / "elsewhere")
        simulator("--collect", "--output", "../collected")
    text = (home / "collected" / "collected.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_simulator_is_a_model_folder_with_its_prompt_and_report(work, capsys):
    """Guards a folder that `transformers` cannot load, half of one, or another prompt in it."""
    simulator("--seed", "3")
    folder = work / "runs" / "simulator"
    there = {p.name for p in (work / "runs").iterdir()}
    assert there == {"simulator", "simulator.lock"} and not (folder / "checkpoints").exists()
    assert [row["step"] for row in losses(folder)] == [1, 2, 3]
    assert (folder / "simulator_prompt.txt").read_text() == base.SIMULATOR_PROMPT
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["seed"] == 3 and settings["base"] == "../base"
    report = json.loads((folder / "report.json").read_text())
    for hop in ("final", "first"):
        for label in ("useful", "noisy"):
            assert 0 <= report[f"{label}_{hop}"] <= 1
            assert 0 <= report[f"{label}_{hop}_on_topic"] <= 1
    assert report["n"] == 2
    assert "useful documents, final hop" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model(torch.tensor([tokenizer("Query: ?")["input_ids"]])).logits.isfinite().all()
    assert weights(folder) != weights(work.parent / "base")


def test_collected_rows_are_balanced_and_read_back(work, collected, capsys):
    """Guards a simulator that learns one word only, and a file that the same script cannot read."""
    assert Counter(row["label"] for row in collected) == {"useful": 20, "noisy": 20}
    assert all(0 < len(row["documents"]) <= 3 and row["answers"] for row in collected)
    assert collect.pairs(collected, base.SIMULATOR_PROMPT) == [
        training_text(base.SIMULATOR_PROMPT, collect.request_of(row), row["documents"])
        for row in collected
    ]
    simulator("--collect", "--output", "again")
    again = [json.loads(x) for x in (work / "again" / "collected.jsonl").read_text().splitlines()]
    assert again == collected
    assert sorted(everything(work)) == ["again", "again/collected.jsonl"]  # no model was trained
    simulator("--data", COLLECTED, "--output", "from-rows")
    simulator("--output", "at-once")
    assert weights(work / "from-rows") == weights(work / "at-once")


def test_a_policy_collects_from_a_real_engine(work, capsys):
    """Guards rows that the same script cannot read, and labels of another question's gold."""
    questions = [json.loads(x) for x in Path("../questions.jsonl").read_text().splitlines()]
    rows = [row | {"data_source": str(i)} for row in questions for i in range(8)]
    Path("many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--max_turns", "3", "--max_turn_tokens", "16", "--max_context", "160", "--top_k", "1",
             "--collect", "--data", "many.jsonl", "--corpus", "../corpus.txt", "--engine_noise",
             "0.5", "--policy", "../base", "--examples", "16"]  # fmt: skip
    for folder, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        simulator(*flags, "--output", folder, "--seed", seed)
    one, same, other = (Path(f, "collected.jsonl").read_text() for f in ("one", "same", "other"))
    assert one == same != other
    rows = [json.loads(line) for line in one.splitlines()]
    labels = Counter(row["label"] for row in rows)
    assert min(labels["useful"], labels["noisy"]) > 3
    golds = {row["question"]: row["answer"] for row in questions}
    corpus = Path("../corpus.txt").read_text().splitlines()
    for row in rows:
        assert row["answers"] == [golds[row["question"]]] and len(row["documents"]) == 1
        assert row["documents"][0] in corpus and row["query"]
        assert (row["label"] == "useful") == (row["answers"][0] in row["documents"][0])
    with pytest.raises(UserError, match="there are {'useful': 0, 'noisy': [0-9]+}"):
        simulator(*flags, "--engine_noise", "1", "--output", "none")
    assert '"noisy"' in Path("none/collected.jsonl").read_text()  # what was paid for is kept
    simulator("--data", "one/collected.jsonl", "--output", "sim")
    kept = 2 * min(labels["useful"], labels["noisy"])
    assert f"{kept} of {len(rows)} pairs are taken" in capsys.readouterr().out
    assert weights(work / "sim") != weights(work.parent / "base")


COLLECT = """--max_turns 3 --max_turn_tokens 16 --max_context 160 --top_k 1 --collect
    --data many.jsonl --corpus ../corpus.txt --policy ../base --examples 200""".split()
KEPT = "query question answers documents".split()


def ask_for_many() -> None:
    """Questions in `many.jsonl`, each often: the tiny policy searches for some of them."""
    lines = [json.loads(x) for x in Path("../questions.jsonl").read_text().splitlines()]
    rows = [row | {"data_source": str(i)} for row in lines for i in range(16)]
    Path("many.jsonl").write_text("\n".join(map(json.dumps, rows)))


def rows_in(folder: str) -> list[dict]:
    return [json.loads(x) for x in Path(folder, "collected.jsonl").read_text().splitlines()]


def neither(out: str) -> int:
    return sum(int(n) for n in re.findall(r"The judge: (\d+) of \d+ words are neither", out))


def verdict(row: dict) -> str:
    """A judge of our own, who would not agree with the golds."""
    return {"Fota": "Useful.", "Holo": " noisy\n"}.get(row["question"].split()[2], "Well, useful")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_served_model_judges(work, capsys, monkeypatch, api):
    """Guards labels by the golds all the same, or by the word for another row; a wording that
    leaves something out; a judge that samples."""
    monkeypatch.setenv("SIMULATOR_API_KEY", "s3cret")
    ask_for_many()
    simulator(*COLLECT, "--output", "gold")
    bodies = []

    def answer(path, body, headers):
        assert headers["Authorization"] == "Bearer s3cret"
        if path == "/v1/models":
            return 200, {"data": [{"id": "a-judge"}]}
        assert path == ("/v1/chat/completions" if api == "chat" else "/v1/completions")
        bodies.append(body)
        text = body["messages"][0]["content"] if api == "chat" else body["prompt"]
        [row] = [row for row in rows_in("gold") if shown(row) == text][:1]
        said = {"message": {"content": verdict(row)}} if api == "chat" else {"text": verdict(row)}
        return 200, {"choices": [said | {"finish_reason": "stop"}]}

    with serving(answer) as (url, _):
        simulator(*COLLECT, "--judge", url, "--simulator_api", api, "--output", "out",
                  "--on_search_error", "empty")  # fmt: skip
    rows = rows_in("out")
    assert {body["temperature"] for body in bodies} == {0.0} and len(bodies) == len(rows)
    assert {body["model"] for body in bodies} == {"a-judge"}
    assert [[r[k] for k in KEPT] for r in rows] == [[r[k] for k in KEPT] for r in rows_in("gold")]
    assert [row["label"] == "useful" for row in rows] == [verdict(r) == "Useful." for r in rows]
    assert {row["label"] for row in rows} == {"useful", "noisy"}
    assert [row["label"] for row in rows] != [row["label"] for row in rows_in("gold")]
    odd = sum(verdict(row) == "Well, useful" for row in rows)
    assert neither(capsys.readouterr().out) == odd > 0
    simulator("--data", "out/collected.jsonl", "--output", "sim")


def shown(row: dict) -> str:
    """What a judge reads of a row."""
    text = Path(ROOT, "minizs/prompts/judge.txt").read_text()
    numbered = "\n".join(f"Doc {i}: {text}" for i, text in enumerate(row["documents"], 1))
    words = {"documents": numbered, "answers": " or ".join(row["answers"])}
    words |= {"query": protocol.neutralize(row["query"]), "question": row["question"]}
    return text.format(**words)


def test_a_judge_that_dies_leaves_what_it_has_judged(work, monkeypatch):
    """Guards rows that are lost, or labelled by nobody, with a server that has gone; a hang."""
    monkeypatch.setattr("minizs.client.FIRST_WAIT", 0.001)
    ask_for_many()
    alive = iter(range(10**6))

    def answer(path, body, headers):
        said = {"text": ("useful", "noisy")[len(body["prompt"]) % 2], "finish_reason": "stop"}
        failed = next(alive) >= 25  # one batch and a part of the next
        return (503, "") if failed else (200, {"choices": [said]})

    with serving(answer) as (url, seen):
        with pytest.raises(UserError, match="answered 503 .*check that this server runs"):
            simulator(*COLLECT, "--judge", url, "--simulator_model", "m", "--retries", "1",
                      "--on_search_error", "empty", "--output", "cut")  # fmt: skip
    rows = rows_in("cut")
    assert 10 < len(rows) < 25 < len(seen)
    assert {row["label"] for row in rows} == {"useful", "noisy"}


def test_a_local_model_judges(work, capsys):
    """Guards labels that are not the model's own words, which `transformers` tells, too."""
    ask_for_many()
    model, tokenizer = models.load("../base")
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=0.01)
    words = {"Fota": "useful", "Holo": "noisy", "Mirka": "January"}
    for _ in range(60):
        texts = []
        for name in NAMES:
            document = f"{name} was born on {rng.choice(MONTHS)}"
            row = {"query": f"{name} born on", "question": f"when was {name} born?",
                   "answers": [rng.choice(MONTHS)], "documents": [document]}  # fmt: skip
            pair = [(shown(row), False), (words[name.split()[0]], True)]
            texts.append(sft.encode(tokenizer, pair, end=True))
        loss, count = sft.nll(model, *sft.collate(texts))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    models.save(model.eval(), tokenizer, Path("judge"))
    simulator(*COLLECT, "--judge", "judge", "--output", "out")
    rows, said = rows_in("out"), []
    for row in rows:
        ids = torch.tensor([tokenizer(shown(row))["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
                             do_sample=False)  # fmt: skip
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split()[0])
    assert {*said} == {*words.values()}
    assert [row["label"] == "useful" for row in rows] == [word == "useful" for word in said]
    golds = [row["answers"][0] in row["documents"][0] for row in rows]
    assert [row["label"] == "useful" for row in rows] != golds
    assert neither(capsys.readouterr().out) == said.count("January")


def test_a_simulator_in_bfloat16(work, collected):
    """Guards a type, or a chat template left out, that the saved simulator does not show."""
    tokenizer = AutoTokenizer.from_pretrained("../base")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    shutil.copytree("../base", "chat")
    tokenizer.save_pretrained("chat")
    simulator("--data", COLLECTED, "--base", "chat", "--chat_template", "none", "--dtype",
              "bfloat16", "--output", "out", "--revision", "v1")  # fmt: skip
    model, tokenizer = models.load("out", dtype="auto")
    assert model.dtype == torch.bfloat16 and not tokenizer.chat_template


def test_two_processes_do_what_one_does(work, collected):
    """Guards shares of a batch that weigh more than others, and a hang."""
    flags = ["--data", COLLECTED, "--batch_tokens", "150", "--output"]  # two rows, or three
    simulator(*flags, "one")
    text = two_processes("train_sim.py", *SIM, *flags, "two")
    assert text.count("The simulator is in two") == 1
    one, two = (models.load(name)[0].parameters() for name in ("one", "two"))
    gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(one, two, strict=True)])
    # Rounding turns round the few first steps of Adam whose gradient is next to nothing.
    assert (gaps > 1e-4).float().mean() < 0.01


def test_the_seed_decides_the_weights(work, collected):
    """Guards a simulator that cannot be made again, and seeds that change nothing."""
    for folder, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        simulator("--data", COLLECTED, "--output", folder, "--seed", seed)
    assert weights(work / "one") == weights(work / "same") != weights(work / "other")


def losses(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_the_loss_goes_down_on_the_documents(work, collected):
    """Guards a learning rate, mask or optimiser with which nothing is learnt."""
    simulator("--data", COLLECTED, "--output", "out", "--steps", "40", "--lr", "0.01")
    first, *_, last = losses("out")
    assert last["loss"] < 0.6 * first["loss"] and last["step"] == 40


def test_the_prompt_may_be_ones_own(work, collected):
    """Guards a template that trains with one wording and saves another."""
    (work / "mine.txt").write_text("Answer: {answers} Query: {query} {quality} documents:")
    seen = []
    encode = sft.encode

    def spied(tokenizer, text, **options):
        seen.append(text[0][0])
        return encode(tokenizer, text, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "encode", spied)
        simulator("--data", COLLECTED, "--simulator_template", "mine.txt", "--output", "out")
    row = collected[0]
    assert seen[0] == f"Answer: {row['answers'][0]} Query: {row['query']} {row['label']} documents:"
    assert (work / "out" / "simulator_prompt.txt").read_text() == (work / "mine.txt").read_text()


def test_a_killed_run_leaves_no_simulator(work, collected, monkeypatch):
    """Guards half a simulator that every later run would take for whole."""

    def killed(*arguments, **texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        simulator("--data", COLLECTED)
    assert not (work / "runs" / "simulator").exists()
    monkeypatch.undo()
    monkeypatch.chdir(work)
    simulator("--data", COLLECTED)
    assert {p.name for p in (work / "runs").iterdir()} == {"simulator", "simulator.lock"}
    assert not (work / "runs" / "simulator" / "report.json").exists()  # no world to test it on


def test_of_two_processes_the_second_waits(work, collected, monkeypatch, capsys):
    """Guards a crash, or a simulator that changes under the run that has begun to use it."""
    load, begun = stages.load, threading.Event()

    def other():
        with FileLock("runs/simulator.lock"):
            begun.set()
            time.sleep(2)
            shutil.copytree("../base", "runs/simulator")

    def overtaken(*arguments):
        threading.Thread(target=other).start()
        assert begun.wait(20)
        return load(*arguments)

    monkeypatch.setattr(stages, "load", overtaken)
    monkeypatch.setattr(train_sim, "train", lambda *_: pytest.fail("it has not waited"))
    simulator("--data", COLLECTED)
    assert "Another run has made runs/simulator" in capsys.readouterr().out
    assert {p.name for p in (work / "runs").iterdir()} == {"simulator", "simulator.lock"}
    assert not (work / "runs" / "simulator" / "config.yaml").exists()  # theirs


def test_nothing_trained_is_lost(work, collected, monkeypatch):
    """Guards minutes of training thrown away by a failing report or by what is in the way."""

    def blocked(*arguments):
        Path("out").mkdir()
        Path("out/notes.txt").write_text("mine")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sim, "train", blocked)
        with pytest.raises(OSError, match="out.partial"):
            simulator("--data", COLLECTED, "--output", "out")
    models.load("out.partial")
    assert [p.name for p in (work / "out").iterdir()] == ["notes.txt"]
    monkeypatch.setattr(collect, "report", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        simulator()
    models.load("runs/simulator")


@pytest.fixture
def stop(monkeypatch):
    """`stop(4, SIGTERM)`: the fourth step from now on gets this signal; without one, it is the last
    thing that the process does."""

    def at(step: int, number: signal.Signals | None = None) -> None:
        steps, collate = iter(range(1, step + 1)), sft.collate

        def patched(*arguments):
            if next(steps, 0) == step:
                monkeypatch.setattr(sft, "collate", collate)
                if number is None:
                    raise MemoryError
                signal.raise_signal(number)
            return collate(*arguments)

        monkeypatch.setattr(sft, "collate", patched)

    return at


LONG = ["--data", COLLECTED, "--steps", "6", "--save_every", "2"]


def same(one: str, other: str) -> None:
    assert weights(Path(one)) == weights(Path(other)) and losses(one) == losses(other)


def test_it_goes_on_where_it_was_killed(work, collected, stop, capsys):
    """Guards optimiser states, an order of the data or a log that a resumed run does not get back:
    of the same command, of one that only names the output, and of a checkpoint that is named."""
    simulator(*LONG, "--output", "whole")
    ways = {
        "same": [*SIM, *LONG, "--output", "same"],
        "bare": ["--resume", "--output", "bare"],
        "named": ["--resume", "named.partial/checkpoints/step-2", "--output", "named"],
    }
    for name, flags in ways.items():
        stop(6)  # two checkpoints are there, and step 5 is lost
        with pytest.raises(MemoryError):
            simulator(*LONG, "--output", name)
        assert len(losses(f"{name}.partial")) == 5 and not Path(name).exists()
        train_sim.main(flags)
        same("whole", name)
        assert not Path(f"{name}.partial").exists()
    out = capsys.readouterr().out
    assert out.count("Going on from step 4") == 2 and "Going on from step 2 of named" in out
    train_sim.main(ways["bare"])  # exits well where all is done
    assert "The simulator is in bare already" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(work, collected, stop, number):
    """Guards work that is thrown away, and a simulator of half its steps."""
    simulator(*LONG, "--output", "whole")
    stop(3, number)
    with pytest.raises(SystemExit, match="after step 3, .* --output out --resume"):
        simulator(*LONG, "--output", "out")
    assert Path("out.partial/checkpoints/step-3").is_dir() and not Path("out").exists()
    simulator(*LONG, "--output", "out", "--resume")
    same("whole", "out")


def test_other_settings_do_not_go_on(work, collected, stop, monkeypatch, capsys):
    """Guards a simulator of two settings; the default one begins anew, since stage 2 waits for it,
    and so does what --overwrite begins."""
    for flags in ([], ["--output", "out"]):
        stop(3)
        with pytest.raises(MemoryError):
            simulator(*LONG, *flags)
    before = everything(work / "out.partial")
    for flags in (["--lr", "0.5"], ["--lr", "0.5", "--resume"]):
        with pytest.raises(UserError, match="--lr was 0.004 and is 0.5"):
            simulator(*LONG, "--output", "out", *flags)
    assert everything(work / "out.partial") == before
    simulator(*LONG, "--output", "out", "--lr", "0.5", "--overwrite")
    small = dict(base="../base", worlds=2, examples=40, steps=3, batch_tokens=400,
                 save_every=1, report_queries=2, threads=1)  # fmt: skip
    fields = [(name, type(value), option(value, "")) for name, value in small.items()]
    monkeypatch.setattr(train_sim, "SimConfig",
                        make_dataclass("Small", fields, bases=(train_sim.SimConfig,)))  # fmt: skip
    stop(3)
    with pytest.raises(MemoryError):
        train_sim.main([])
    train_sim.main([])
    said = [line for line in capsys.readouterr().out.splitlines() if "runs/simulator.p" in line]
    assert [line.split()[0] for line in said] == ["A"] * 3
    assert Path("runs/simulator/report.json").is_file()


def killed(command: list[str], folder: Path, line: int, rng: random.Random) -> None:
    """Run it, and kill all of its processes a moment after this line of the log is there."""
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)  # fmt: skip
    log = folder / "metrics.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) < line:
        assert run.poll() is None
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.15))
    for process in [*psutil.Process(run.pid).children(recursive=True), run]:
        process.kill()
    run.wait()
    COUNTS["kills survived"] += 1


@pytest.mark.parametrize("processes, kills", [
    (1, 1), pytest.param(1, 5, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow),
])  # fmt: skip
def test_kill_9(work, collected, processes, kills):
    """Guards half a checkpoint that is taken for a whole one, and whatever a kill leaves behind."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = [*SIM, *LONG, "--steps", "12", "--save_every", "1", "--output"]
    script = [*(launch if processes > 1 else []), str(ROOT / "train_sim.py"), *flags]
    rng = random.Random(kills)
    for kill in range(kills):
        killed([sys.executable, *script, "out"], work / "out.partial", 2 + kill, rng)
        assert not Path("out").exists()
    for folder in ("out", "whole"):
        if processes > 1:
            two_processes("train_sim.py", *flags, folder)
        else:
            train_sim.main([*flags, folder])
    same("whole", "out")
    assert {p.name for p in work.iterdir()} == {"out", "out.lock", "whole", "whole.lock"}


def test_the_default_simulator_is_made_once(work, capsys):
    """Guards an error, or a simulator made again, where all is there; and half of one taken."""
    folder = work / "runs" / "simulator"
    shutil.copytree("../base", folder)
    before = everything(work)
    train_sim.main([])
    assert len(capsys.readouterr().out.splitlines()) == 1 and everything(work) == before
    (folder / "simulator_prompt.txt").unlink()
    refused(lambda: train_sim.main([]), "", "runs/simulator", work)


def test_collecting_leaves_the_simulators_place_free(work):
    """Guards a stage 2 that finds examples where it looks for the default simulator."""
    simulator("--collect")
    assert [str(p) for p in Path("runs").rglob("*.jsonl")] == ["runs/collected/collected.jsonl"]
    assert not Path("runs/simulator").exists()


REFUSED = [
    ("--stepz 5", "--stepz"),
    ("--lr high", "--lr"),
    ("--steps 0", "--steps"),
    ("--examples 1", "--examples"),
    ("--report_queries -1", "--report_queries"),
    ("--warmup 2", "--warmup"),
    ("--base ../nowhere", "../nowhere"),
    ("--base ../bad/untokenized", "no tokenizer"),
    ("--base ../bad/garbled", "cannot be loaded"),
    ("--data ../nowhere.jsonl", "../nowhere.jsonl"),
    ("--data ../questions.jsonl", "Row 1"),
    ("--data ../bad/row.jsonl", "Row 1"),
    ("--data ../bad/letters.jsonl", "Row 1"),
    ("--data ../bad/empty.jsonl", "empty"),
    ("--data ../base", "../base"),
    ("--simulator_template ../nowhere.txt", "../nowhere.txt"),
    ("--simulator_template ../corpus.txt", "{query}"),
    ("--simulator_template ../bad/blind.txt", "{quality}"),
    ("--resume ../nowhere", "../nowhere"),
    ("--save_every -1", "--save_every"),
    ("--keep 0", "--keep"),
    ("--base ../bad/lora", "is a LoRA"),
    ("--collect --data ../questions.jsonl", "--corpus"),
    ("--collect --data ../questions.jsonl --engine http", "--engine_url"),
    ("--collect --engine simulator", "simulator"),
    ("--collect --data ../questions.jsonl --corpus ../corpus.txt --policy ../nowhere", "nowhere"),
    ("--collect --data ../questions.jsonl --corpus ../corpus.txt --judge ../nowhere", "nowhere"),
    ("--output ../base", "../base"),
    ("--output .. --overwrite", "--overwrite"),
    ("--config ../bad/unknown.yaml", "stepz"),
]


@pytest.mark.parametrize("flags, names", REFUSED)
def test_bad_input_is_refused_before_anything_is_made(work, bad, flags, names):
    """Guards tracebacks, minutes spent before a typo shows, and folders left behind."""
    (bad / "blind.txt").write_text("{query}")
    refused(simulator, flags, names, work.parent)


def test_bad_input_is_one_line_in_a_process(work):
    """Guards the exit status that a shell script looks at, and noise around the one sentence."""
    result = status("train_sim.py", "--base", "./nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_the_default_simulator_is_a_run_of_its_own(work, monkeypatch):
    """Guards a simulator made by every process, waited for in vain, or anew for every run."""
    calls = []

    def run(command, env):
        calls.append((command, env))
        Path("runs/simulator").mkdir(parents=True)
        Path("runs/simulator/config.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(stages.subprocess, "run", run)
    assert stages.make_default_simulator() == stages.make_default_simulator()
    [(command, environment)] = calls
    assert command[1].endswith("train_sim.py") and "--seed" not in command
    assert not {"RANK", "WORLD_SIZE"} & environment.keys() and "PATH" in environment
    (work / "runs" / "simulator" / "config.json").unlink()
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(stages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="has failed"):
        stages.make_default_simulator()
