"""Stage 1 from end to end, through `main(argv)`, on a tiny model."""

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from scripts import (
    COLLECTED,
    SIM,
    everything,
    losses,
    refused,
    simulator,
    status,
    two_processes,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_sim
from benchmarks import tiny_base as base
from minizs import UserError, sft
from minizs.imitation import collect, pairs, stage1
from minizs.models import loading
from minizs.runs import build
from minizs.simulator import training_text


def test_a_simulator_is_a_model_folder_with_its_prompt_and_report(work, capsys):
    """A simulator is a folder that `transformers` loads, with its prompt, a line of metrics for
    each step, its settings and a report."""
    simulator("--seed", "3")
    folder = work / "runs" / "simulator"
    names = {p.name for p in (work / "runs").iterdir()}
    assert names == {"simulator", ".simulator.lock"} and not (folder / "checkpoints").exists()
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
    """A collection has as many useful as noisy rows, is the same each time, and trains the
    simulator that is trained without this stop on the way."""
    assert Counter(row["label"] for row in collected) == {"useful": 20, "noisy": 20}
    assert all(0 < len(row["documents"]) <= 3 and row["answers"] for row in collected)
    assert pairs.make_pairs(collected, base.SIMULATOR_PROMPT) == [
        training_text(base.SIMULATOR_PROMPT, collect.request_of(row), row["documents"])
        for row in collected
    ]
    simulator("--collect", "--output", "again")
    second = [json.loads(x) for x in (work / "again" / "collected.jsonl").read_text().splitlines()]
    assert second == collected
    files = [".again.lock", "again", "again/collected.jsonl", "again/config.yaml"]
    assert sorted(everything(work)) == files  # no model was trained
    simulator("--data", COLLECTED, "--output", "from-rows")
    simulator("--output", "at-once")
    assert weights(work / "from-rows") == weights(work / "at-once")


def test_a_policy_collects_from_a_real_engine(work, capsys):
    """A policy's searches become rows with the answers of their own question; the seed decides
    them; and a simulator can be trained on them."""
    questions = [json.loads(x) for x in Path("../questions.jsonl").read_text().splitlines()]
    rows = [row | {"data_source": str(i)} for row in questions for i in range(8)]
    Path("many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [
        "--max_turns",
        "3",
        "--max_turn_tokens",
        "16",
        "--max_context",
        "160",
        "--top_k",
        "1",
        "--collect",
        "--data",
        "many.jsonl",
        "--corpus",
        "../corpus.txt",
        "--engine_noise",
        "0.5",
        "--policy",
        "../base",
        "--examples",
        "16",
    ]
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
    assert '"noisy"' in Path("none.partial/collected.jsonl").read_text()  # it was paid for
    simulator("--data", "one/collected.jsonl", "--output", "sim")
    size = 2 * min(labels["useful"], labels["noisy"])
    assert f"{size} of {len(rows)} pairs are taken" in capsys.readouterr().out
    assert weights(work / "sim") != weights(work.parent / "base")


def test_a_simulator_in_bfloat16(work, collected):
    """The type and the chat template of the training are those of the saved simulator."""
    tokenizer = AutoTokenizer.from_pretrained("../base")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    shutil.copytree("../base", "chat")
    tokenizer.save_pretrained("chat")
    simulator(
        "--data",
        COLLECTED,
        "--base",
        "chat",
        "--chat_template",
        "none",
        "--dtype",
        "bfloat16",
        "--output",
        "out",
    )
    model, tokenizer = loading.load_model("out", dtype="auto")
    assert model.dtype == torch.bfloat16 and not tokenizer.chat_template


def test_two_processes_do_what_one_does(work, collected):
    """Two processes share out a batch and end with the weights of one, also where a batch has too
    few rows for both."""
    flags = ["--data", COLLECTED, "--batch_tokens", "150", "--output"]  # two rows, or three
    simulator(*flags, "one")
    text = two_processes("train_sim.py", *SIM, *flags, "two")
    assert text.count("The simulator is in two") == 1
    one, two = (loading.load_model(name)[0].parameters() for name in ("one", "two"))
    gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(one, two, strict=True)])
    # Rounding turns round the few first steps of Adam whose gradient is next to nothing.
    assert (gaps > 1e-4).float().mean() < 0.01


def test_the_seed_decides_the_weights(work, collected):
    """The same seed gives the same weights, and another seed others."""
    for folder, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        simulator("--data", COLLECTED, "--output", folder, "--seed", seed)
    assert weights(work / "one") == weights(work / "same") != weights(work / "other")


def test_the_loss_goes_down_on_the_documents(work, collected):
    """The training learns: the loss falls by more than a third."""
    simulator("--data", COLLECTED, "--output", "out", "--steps", "40", "--lr", "0.01")
    first, *_, last = losses("out")
    assert last["loss"] < 0.6 * first["loss"] and last["step"] == 40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_is_merged(work, collected, dtype):
    """Only the LoRA learns, in a base that keeps its format; the result is a whole model. A run
    that was killed before its end goes on to the same weights."""
    flags = ["--data", COLLECTED, "--lora_rank", "4", "--lr", "0.05", "--dtype", dtype]
    simulator(*flags, "--output", "whole")
    assert not list((work / "whole").glob("adapter_*"))
    model, _ = loading.load_model("whole", dtype=torch.float32)
    base, _ = loading.load_model("../base", dtype=torch.float32)
    name = "model.embed_tokens.weight"
    kept = base.get_parameter(name).to(getattr(torch, dtype)).float()
    assert torch.equal(model.get_parameter(name), kept)
    ids = torch.arange(5, 25)[None]
    assert (model(ids).logits - base(ids).logits).abs().max() > 0.1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1.lora, "save_lora", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            simulator(*flags, "--output", "again", "--save_every", "2")
    assert losses("again.partial")[-1]["step"] == 3
    simulator(*flags, "--output", "again", "--save_every", "2")
    assert weights(work / "again") == weights(work / "whole")


def test_checkpointed_layers_learn_the_same(work, collected):
    """Activations that are computed twice are the same ones, and so are the weights."""
    for folder, flags in (("one", []), ("two", ["--gradient_checkpointing"])):
        simulator("--data", COLLECTED, "--output", folder, *flags)
    assert weights(work / "one") == weights(work / "two")


def test_the_prompt_may_be_ones_own(work, collected):
    """The wording of a file is what the model is trained with, and what is saved beside it."""
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


def test_the_default_simulator_is_made_once(work, capsys):
    """Where the default simulator is whole, the command without flags does nothing; where it is
    half of one, it is refused."""
    folder = work / "runs" / "simulator"
    shutil.copytree("../base", folder)
    before = everything(work)
    train_sim.main([])
    assert len(capsys.readouterr().out.splitlines()) == 1 and everything(work) == before
    (folder / "simulator_prompt.txt").unlink()
    refused(lambda: train_sim.main([]), "", "runs/simulator", work)


def test_collecting_leaves_the_simulators_place_free(work):
    """Stage 2 finds no examples where it looks for the default simulator."""
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
    """Bad input is one sentence that names what is wrong, and no file is written."""
    (bad / "blind.txt").write_text("{query}")
    refused(simulator, flags, names, work.parent)


def test_bad_input_is_one_line_in_a_process(work):
    """A shell script sees exit status 2 and one line."""
    result = status("train_sim.py", "--base", "./nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_the_default_simulator_is_a_run_of_its_own(work, monkeypatch):
    """Stage 2 starts one process for it, whatever it is part of itself, and makes it once; a
    failure is an error."""
    calls = []

    def run(command, env):
        calls.append((command, env))
        Path("runs/simulator").mkdir(parents=True)
        Path("runs/simulator/config.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(build.subprocess, "run", run)
    assert build.make_default_simulator() == build.make_default_simulator()
    [(command, environment)] = calls
    assert command[1].endswith("train_sim.py") and "--seed" not in command
    assert not {"RANK", "WORLD_SIZE"} & environment.keys() and "PATH" in environment
    (work / "runs" / "simulator" / "config.json").unlink()
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="has failed"):
        build.make_default_simulator()
