"""Stage 2 from end to end, through `main(argv)`, on a tiny model and BM25."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from scripts import POLICY, ROOT, everything, metrics, policy, refused, status, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import train_policy
from minizs import base, data, evaluation, runs, stages
from minizs.config import UserError

LOGGED = """step reward noise searches_per_question valid_rate kl entropy seconds grad_norm answered
    response_tokens""".split()


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "reinforce"])
def test_a_run_leaves_what_it_promises(work, algorithm, capsys, caplog):
    """Guards a folder of a run from which something is missing, or a line too many or too few."""
    flags = ["--algorithm", algorithm, "--eval_every", "2", "--save_every", "1", "--steps", "3"]
    policy(*flags, "--minibatches", "2", "--log_trajectories", "6")
    run = work / "runs" / "policy-1"
    assert "runs/policy-1/policy" in capsys.readouterr().out
    names = "checkpoints config.yaml metrics.jsonl policy report.html trajectories.jsonl"
    assert sorted(p.name for p in run.iterdir()) == names.split()
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(set(LOGGED) <= row.keys() for row in lines)
    assert ["held_out_f1" in row for row in rows] == [False, True, True]
    assert "shared tensor" not in caplog.text  # Accelerate's, amid the progress bar
    assert sum(row["reward"] for row in rows) > 0 and rows[0]["searches_per_question"] > 0
    assert all(0 < row["valid_rate"] <= 1 and row["entropy"] > 0 for row in rows)
    shown = [json.loads(line) for line in (run / "trajectories.jsonl").read_text().splitlines()]
    assert [row["step"] for row in shown] == [1] * 6 + [2] * 6 + [3] * 6
    assert len({row["example"]["question"] for row in shown[:4]}) == 4  # one of each group first
    assert {"ids", "loss_mask", "logprobs", "turns", "reward"} <= shown[0].keys()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-2", "step-3"]
    model = AutoModelForCausalLM.from_pretrained(run / "policy")
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    assert model(torch.tensor([tokenizer("Question: ?")["input_ids"]])).logits.isfinite().all()
    assert weights(run / "policy") != weights(work.parent / "base")
    assert (run / "policy" / "prompt.txt").read_text() == "Question: {question}"
    assert "reward" in (run / "report.html").read_text()


def test_the_tiny_world_tests_on_facts_that_it_does_not_train_on(work):
    """Guards held-out figures that are those of the training questions."""
    policy("--data", "world", "--corpus", "", "--eval_every", "1", "--eval_questions", "8")
    assert all(0 <= row["held_out_f1"] <= 1 for row in metrics(work / "runs" / "policy-1"))
    shown = (work / "runs" / "policy-1" / "trajectories.jsonl").read_text().splitlines()
    held_out = {example.question for example in data.load("world", "dev")}
    assert not held_out & {json.loads(line)["example"]["question"] for line in shown}


def test_a_files_held_out_questions_are_not_trained_on(work, capsys):
    """Guards held-out figures of training questions, or from an engine that knows the answers."""
    rows = [{"question": f"when was Fota {i} born?", "answer": "January"} for i in range(40)]
    (work / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data", "q.jsonl", "--eval_every", "1", "--batch_questions", "8"]
    policy(*flags, "--engine", "simulator", "--simulator", "../base")
    run = work / "runs" / "policy-1"
    held_out = len(data.load("q.jsonl", "dev"))
    assert 0 < held_out < 15 and [row["held_out_n"] for row in metrics(run)] == [held_out] * 2
    policy(*flags, "--engine", "simulator", "--simulator", "../base", "--corpus", "")
    assert "No evaluation while it trains: q.jsonl lacks a --corpus." in capsys.readouterr().out
    assert not any("held_out_f1" in row for row in metrics(work / "runs" / "policy-2"))


def test_held_out_questions_are_shared_by_place(work, monkeypatch):
    """Guards random numbers of an evaluation that hang on the number of processes."""
    seen = []

    def answer_all(model, tokenizer, examples, engine, keys, **_):
        seen.append((len(examples), keys))
        return []

    monkeypatch.setattr(evaluation, "answer_all", answer_all)
    monkeypatch.setattr(evaluation, "summary", len)
    config = train_policy.PolicyConfig(eval_questions=5)
    for rank in range(2):
        accelerator = SimpleNamespace(process_index=rank, num_processes=2)
        stages.held_out(config, accelerator, None, None, "")()
    assert seen == [(3, [(0,), (2,), (4,)]), (2, [(1,), (3,)])]


def test_a_failing_evaluation_loses_nothing(work, monkeypatch, capsys):
    """Guards a checkpoint, or a line of the log, that waits for an evaluation; a last step lost."""
    flags = ["--data", "world", "--corpus", "", "--eval_every", "3", "--save_every", "2"]
    monkeypatch.setattr(stages, "held_out", lambda *_: lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy(*flags, "--steps", "3", "--output", "run")
    monkeypatch.undo()
    os.chdir(work)
    assert [row["step"] for row in metrics(work / "run")] == [1, 2, 3]
    assert (work / "run" / "checkpoints" / "step-3").is_dir()
    train_policy.main(["--output", "run", "--resume"])
    train_policy.main(["--output", "run", "--resume", "--steps", "5", "--eval_questions", "4"])
    assert capsys.readouterr().out.count("Going on from step 3 of run.") == 2
    assert [row["step"] for row in metrics(work / "run")] == [1, 2, 3, 4, 5]
    assert "held_out_f1" in metrics(work / "run")[4]


def test_a_named_checkpoint_is_its_own_runs(work):
    """Guards two runs mixed in a folder, newer checkpoints of a path not taken, a silent no."""
    policy("--output", "run", "--save_every", "1")
    shutil.copytree(work / "run", work / "copy")
    refused(policy, "--output run --resume copy/checkpoints/step-1", "copy/checkpoints/step-1",
            work.parent)  # fmt: skip
    policy("--resume", "run/checkpoints/step-1", "--save_every", "0")  # of a complete run
    assert sorted(p.name for p in (work / "run" / "checkpoints").iterdir()) == ["step-1"]
    assert metrics(work / "run") == metrics(work / "copy")


def test_two_runs_started_together_take_two_folders(work):
    """Guards two runs that write into one log."""
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(runs.new_folder, ["policy"] * 8))
    assert sorted(folders) == [runs.RUNS / f"policy-{n}" for n in range(1, 9)]


def test_every_number_has_a_range():
    """Guards a setting that means nothing and fails, or worse does not, hours later."""
    for script, config in ((train_policy, train_policy.PolicyConfig()),
                           (evaluate, evaluate.EvalConfig())):  # fmt: skip
        for name, value in vars(config).items():
            if type(value) in (int, float) and name != "seed":
                with pytest.raises(UserError, match=f"--{name} "):
                    script.check(replace(config, **{name: -1}))


def test_weights_are_read_before_a_simulator_is_made(work, bad, monkeypatch):
    """Guards minutes of stage 1 before a model turns out to be broken, or too small."""
    monkeypatch.setattr(stages, "make_default_simulator", lambda: 1 / 0)
    refused(policy, "--engine simulator --policy ../bad/garbled", "cannot be loaded", work.parent)
    refused(policy, "--engine simulator --max_document_tokens 1000", "positions", work.parent)


def test_the_shipped_model_can_be_named_as_simulator(work):
    """Guards the wording of `tiny`, which lies in its folder and not in one of that name."""
    config = train_policy.PolicyConfig(simulator="tiny")
    assert stages.simulated_engine("tiny", config, "cpu").template == base.SIMULATOR_PROMPT


def test_the_seed_decides_everything(work):
    """Guards a run that cannot be repeated, and seeds that change nothing."""
    for seed in "112":
        policy("--seed", seed)
    one, same, other = (work / "runs" / f"policy-{n}" for n in (1, 2, 3))
    assert metrics(one) == metrics(same) != metrics(other)
    assert weights(one / "policy") == weights(same / "policy") != weights(other / "policy")


def test_the_settings_beside_a_run_repeat_it(work):
    """Guards settings that are not those used, and that resume or delete when they are fed back."""
    policy("--output", "one", "--overwrite", "--seed", "5", "--kl_coef", "0")
    assert all(row["kl"] == 0 for row in metrics(work / "one"))  # there all the same
    settings = yaml.safe_load((work / "one" / "config.yaml").read_text())
    assert settings["seed"] == 5 and settings["lr"] == 0.01 and settings["steps"] == 2
    train_policy.main(["--config", "one/config.yaml"])
    assert metrics(work / "one") == metrics(work / "runs" / "policy-1")


def test_noise_follows_the_curriculum_of_the_simulator(work):
    """Guards a curriculum that starts late, ends early, or never reaches the simulator (D-list)."""
    policy("--engine", "simulator", "--simulator", "../base", "--noise_start", "0.1",
           "--noise_end", "1", "--steps", "3", "--max_document_tokens", "30")  # fmt: skip
    rows = metrics(work / "runs" / "policy-1")
    # method.md: start + (base^(i/n) - 1) / (base - 1) * (end - start), with base 4
    expected = [0.1 + (4 ** (i / 3) - 1) / 3 * 0.9 for i in (1, 2, 3)]
    assert [row["noise"] for row in rows] == pytest.approx(expected)
    shown = (work / "runs" / "policy-1" / "trajectories.jsonl").read_text().splitlines()
    turns = [turn for line in shown if json.loads(line)["step"] == 3
             for turn in json.loads(line)["turns"] if turn["documents"] is not None]  # fmt: skip
    assert turns and all(turn["noisy"] for turn in turns)


def test_a_real_engine_has_constant_noise(work):
    """Guards the curriculum acting on a real engine, or --engine_noise acting on none."""
    policy("--engine_noise", "1")
    assert [row["noise"] for row in metrics(work / "runs" / "policy-1")] == [1, 1]
    for line in (work / "runs" / "policy-1" / "trajectories.jsonl").read_text().splitlines():
        row = json.loads(line)
        for documents in (turn["documents"] for turn in row["turns"] if turn["documents"]):
            assert not any(row["example"]["answers"][0] in text for text in documents)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(work, algorithm, monkeypatch, capsys):
    """Guards lost optimiser state, repeated data or noise, doubled lines, a moved KL reference."""
    flags = ["--algorithm", algorithm, "--steps", "4", "--save_every", "2", "--kl_coef", "0.1"]
    policy(*flags, "--output", "whole")
    write = runs.RunFolder.write_trajectories

    def killed(run, step, trajectories):
        write(run, step, trajectories)
        if step == 3:
            (run.folder / "metrics.jsonl").open("a").write('{"step": 4, "rew')
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.RunFolder, "write_trajectories", killed)
    with pytest.raises(KeyboardInterrupt):
        policy(*flags, "--output", "cut")
    monkeypatch.undo()
    os.chdir(work)
    assert not (work / "cut" / "policy").exists()
    shutil.copytree(work / "cut", work / "named")
    train_policy.main(["--output", "cut", "--resume"])  # with its own settings
    assert "Going on from step 2 of cut." in capsys.readouterr().out
    policy(*flags, "--resume", "named/checkpoints/step-2")
    for run in ("cut", "named"):
        assert metrics(work / run) == metrics(work / "whole")
        assert weights(work / run / "policy") == weights(work / "whole" / "policy")
        text = (work / run / "trajectories.jsonl").read_text()
        assert text == (work / "whole" / "trajectories.jsonl").read_text()
    assert metrics(work / "cut")[3]["kl"] != 0
    before = everything(work)
    policy(*flags, "--output", "cut", "--resume")
    assert "The run in cut is complete." in capsys.readouterr().out
    assert everything(work) == before


def test_resume_without_a_checkpoint_starts_at_step_one(work, capsys):
    """Guards a restart script that fails the first time, or numbers a new folder every time."""
    policy("--resume")
    assert capsys.readouterr().out.splitlines()[0] == "A new run in runs/policy-1."
    assert [row["step"] for row in metrics(work / "runs" / "policy-1")] == [1, 2]
    policy("--resume", "--steps", "3", "--save_every", "1")  # no checkpoint: again from step 1
    assert [row["step"] for row in metrics(work / "runs" / "policy-1")] == [1, 2, 3]
    assert not (work / "runs" / "policy-2").exists()


def test_overwrite_begins_anew(work):
    """Guards a new run whose logs and checkpoints are mixed with those of an old one."""
    policy("--output", "here", "--save_every", "1")
    policy("--output", "here", "--overwrite", "--steps", "1")
    assert len(metrics(work / "here")) == 1
    assert not (work / "here" / "checkpoints").exists()


REFUSED = [
    ("--stepz 5", "--stepz"),
    ("--step 5", "--step"),
    ("--steps many", "--steps"),
    ("--steps 0", "--steps"),
    ("--algorithm dpo", "dpo"),
    ("--policy ../nowhere", "../nowhere"),
    ("--policy ../questions.jsonl", "questions.jsonl"),
    ("--policy ../bad/empty", "config.json"),
    ("--policy ../bad/untokenized", "no tokenizer"),
    ("--policy ../bad/weightless", "no *.safetensors"),
    ("--policy ../bad/garbled", "cannot be loaded"),
    ("--engine simulator --simulator ../nowhere", "../nowhere"),
    ("--data ../nowhere.jsonl", "../nowhere.jsonl"),
    ("--data ../corpus.txt", ".parquet"),
    ("--data ../bad/columns.jsonl", "'question'"),
    ("--data ../bad/empty.jsonl", "empty.jsonl"),
    ("--corpus ../nowhere.txt", "../nowhere.txt"),
    ("--corpus ../bad/empty.txt", "empty.txt"),
    ("--corpus ../base/model.safetensors", "no text file"),
    ("--engine simulator --data world --corpus ../nowhere.txt", "../nowhere.txt"),
    ("--group_size 1", "--group_size"),
    ("--minibatches 4", "--group_size 2"),  # it divides the batch, but not its groups
    ("--noise_end 1.5", "--noise_end"),
    ("--engine_noise -0.1", "--engine_noise"),
    ("--engine simulator --engine_noise 0.5", "--engine_noise"),
    ("--max_context 4", "--max_context 4"),
    ("--engine simulator --max_context 4", "--max_context 4"),  # before the simulator is made
    ("--max_context 2048", "--max_context 2048"),
    ("--temperature 0", "--temperature"),
    ("--lr nan", "--lr"),
    ("--save_every -1", "--save_every"),
    ("--keep 0", "--keep"),
    ("--eval_questions 0", "--eval_questions"),
    ("--threads -1", "--threads"),
    ("--output ../base", "../base"),
    ("--output ../corpus.txt", "corpus.txt"),
    ("--output ../corpus.txt/x", "corpus.txt is a file"),
    ("--output ../base --overwrite", "holds no run"),
    ("--output .. --overwrite", "--overwrite"),
    ("--output new --resume --overwrite", "--resume"),
    ("--resume runs/policy-1/checkpoints/step-7", "step-7"),
    ("--config ../nowhere.yaml", "nowhere.yaml"),
    ("--config ../bad/unknown.yaml", "stepz"),
]


@pytest.mark.parametrize("flags, names", REFUSED)
def test_bad_input_is_refused_before_anything_is_made(work, bad, flags, names):
    """Guards tracebacks, hours spent before a typo shows, and folders left behind."""
    refused(policy, flags, names, work.parent)


def test_bad_input_is_one_line_in_a_process(work):
    """Guards the exit status that a shell script looks at, and noise around the one sentence."""
    result = status("train_policy.py", "--steps", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --steps must be greater than 0.\n"


def test_two_processes_do_what_one_does(work):
    """Guards shares of a batch that differ with the number of processes, and a hang."""
    flags = [*POLICY, "--save_every", "1"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *launch, str(ROOT / "train_policy.py"), *flags]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=200)
    policy("--save_every", "1")
    two, one = metrics(work / "runs" / "policy-1"), metrics(work / "runs" / "policy-2")
    assert len(two) == len(one) == 2
    for name in ("reward", "searches_per_question", "response_tokens", "entropy", "grad_norm"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3)
    assert two[1]["reward"] == pytest.approx(one[1]["reward"], abs=0.26)  # a near-tie may flip
