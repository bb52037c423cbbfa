"""Stage 2 from end to end, through `main(argv)`, on a tiny model and BM25."""

import json
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from scripts import (
    POLICY,
    metrics,
    on_each,
    policy,
    refused,
    status,
    two_processes,
    weights,
)
from servers import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import train_policy
from benchmarks import tiny_base as base
from minizs import UserError, simulator
from minizs.engines.client import ServiceError
from minizs.evaluation import held_out
from minizs.models import weights as model_weights
from minizs.runs import build, data, run_folder
from minizs.trajectory import Trajectory

LOGGED = """step reward noise searches_per_question valid_rate kl entropy seconds grad_norm answered
    response_tokens""".split()


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "reinforce"])
def test_a_run_leaves_what_it_promises(work, algorithm, capsys, caplog):
    """A folder has settings, a line for each step, trajectories, checkpoints, a page, a policy."""
    flags = ["--algorithm", algorithm, "--eval_every", "2", "--save_every", "1", "--steps", "3"]
    policy(*flags, "--minibatches", "2")
    run = work / "runs" / "policy-1"
    assert "runs/policy-1/policy" in capsys.readouterr().out
    names = "checkpoints config.yaml cost.json metrics.jsonl policy report.html trajectories.jsonl"
    assert sorted(p.name for p in run.iterdir()) == names.split()
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(set(LOGGED) <= row.keys() for row in lines)
    assert ["held_out_f1" in row for row in rows] == [False, True, True]
    assert "shared tensor" not in caplog.text  # Accelerate's, amid the progress bar
    assert sum(row["reward"] for row in rows) > 0 and rows[0]["searches_per_question"] > 0
    assert all(0 < row["valid_rate"] <= 1 and row["entropy"] > 0 for row in rows)
    lines = [json.loads(line) for line in (run / "trajectories.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [1] * 8 + [2] * 8 + [3] * 8
    assert len({row["example"]["question"] for row in lines[:4]}) == 4  # one of each group first
    assert {"ids", "loss_mask", "logprobs", "turns", "reward"} <= lines[0].keys()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-2", "step-3"]
    model = AutoModelForCausalLM.from_pretrained(run / "policy")
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    assert model(torch.tensor([tokenizer("Question: ?")["input_ids"]])).logits.isfinite().all()
    assert weights(run / "policy") != weights(work.parent / "base")
    assert (run / "policy" / "prompt.txt").read_text() == "Question: {question}"
    assert "reward" in (run / "report.html").read_text()


def test_the_tiny_world_tests_on_facts_that_it_does_not_train_on(work):
    """Held-out questions are none of the training questions."""
    policy("--data", "world", "--corpus", "", "--eval_every", "1", "--eval_questions", "8")
    assert all(0 <= row["held_out_f1"] <= 1 for row in metrics(work / "runs" / "policy-1"))
    lines = (work / "runs" / "policy-1" / "trajectories.jsonl").read_text().splitlines()
    held_out = {example.question for example in data.load_examples("world", "dev")}
    assert not held_out & {json.loads(line)["example"]["question"] for line in lines}


def test_a_files_held_out_questions_are_not_trained_on(work, capsys):
    """A tenth of a file is held out, and tested with BM25 only: a simulator knows the answers. The
    noisy test is of the same questions, unless it is turned off."""
    rows = [{"question": f"when was Fota {i} born?", "answer": "January"} for i in range(40)]
    (work / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data", "q.jsonl", "--eval_every", "1", "--batch_questions", "8"]
    policy(*flags, "--engine", "simulator", "--simulator", "../base")
    run = work / "runs" / "policy-1"
    held_out = len(data.load_examples("q.jsonl", "dev"))
    assert 0 < held_out < 15 and [row["held_out_n"] for row in metrics(run)] == [held_out] * 2
    assert [row["held_out_noisy_n"] for row in metrics(run)] == [held_out] * 2
    policy(*flags, "--eval_noise", "0", "--output", "clean")
    assert [row["held_out_n"] for row in metrics(work / "clean")] == [held_out] * 2
    assert not any("held_out_noisy_n" in row for row in metrics(work / "clean"))
    policy(*flags, "--engine", "simulator", "--simulator", "../base", "--corpus", "")
    assert "No evaluation while it trains" in capsys.readouterr().out
    assert not any("held_out_f1" in row for row in metrics(work / "runs" / "policy-2"))


def test_held_out_questions_are_shared_by_place(work, monkeypatch):
    """An answer depends on the question's place, not on the number of processes."""
    seen = []
    models = iter("abcd")

    def rollout(policy, examples, keys, noise, **_):
        seen.append((keys, noise, policy.model, policy.temperature))
        return [Trajectory(example, answer=example.answers[0]) for example in examples]

    monkeypatch.setattr(held_out, "rollout", rollout)
    config = train_policy.PolicyConfig(eval_questions=5)

    def evaluate(accelerator):
        test = held_out.held_out_test(config, accelerator, lambda: next(models), None, "")
        return [test(), test()]

    main, other = on_each(2, evaluate, monkeypatch)
    assert other == [{}, {}] and [row["held_out_n"] for row in main] == [5, 5]
    assert main[0]["held_out_em"] == 1
    shares = [[(0,), (2,), (4,)], [(1,), (3,)]]
    for noise in (0.0, 0.5):
        assert sorted(row[0] for row in seen if row[1] == noise) == sorted(shares * 2)
    # The model of the moment, greedily.
    assert {row[2:] for row in seen} == {(model, 0.0) for model in "abcd"}
    assert [row["held_out_noisy_em"] for row in main] == [1, 1]


def test_the_noisy_test_has_noisy_replies(work, monkeypatch):
    """With --eval_noise 1 no reply of the second test holds what the query needs, while the first
    test is the same as without it."""
    replies = {0.0: [], 1.0: []}
    play = held_out.rollout

    def rollout(policy, *arguments, noise, **options):
        # Greedily the tiny model would not search.
        trajectories = play(replace(policy, temperature=1.0), *arguments, noise=noise, **options)
        for row in trajectories:
            [gold] = row.example.answers
            replies[noise] += [(turn, gold) for turn in row.turns if turn.documents]
        return trajectories

    monkeypatch.setattr(held_out, "rollout", rollout)
    questions = data.load_examples("../questions.jsonl", "test")
    monkeypatch.setattr(data, "is_held_out", lambda example: example in questions[:8])
    flags = ["--steps", "1", "--eval_every", "1"]
    policy(*flags, "--eval_noise", "1", "--output", "run")
    for noise, turns in replies.items():
        assert turns and all(turn.noisy == (noise == 1) for turn, _ in turns)
        held = [gold in str(turn.documents) for turn, gold in turns]
        assert any(held) == (noise == 0)
    [noisy] = metrics(work / "run")
    assert "held_out_noisy_again_after_noisy" in noisy
    policy(*flags, "--eval_noise", "0", "--output", "clean")
    [clean] = metrics(work / "clean")
    assert clean.items() <= noisy.items()
    assert all(name.startswith("held_out_noisy_") for name in noisy.keys() - clean.keys())


def test_the_command_that_a_run_ends_with_tests_its_policy(work, capsys):
    """Pasted into a shell it works, in a folder with a space, and tests what was trained."""
    rows = [{"question": f"when was Fota {i} born?", "answer": "January"} for i in range(40)]
    (work / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    policy("--data", "q.jsonl", "--output", "my run")
    [advice] = re.findall("Test it: python (.*)", capsys.readouterr().out)
    script, *arguments = shlex.split(advice)
    assert Path(script).is_file() and Path(script).name == "evaluate.py"
    evaluate.main([*arguments, "--threads", "1"])
    figures = json.loads((work / "my run" / "evaluation.json").read_text())
    assert figures["overall"]["n"] == len(data.load_examples("q.jsonl", "dev"))


def test_two_runs_started_together_take_two_folders(work):
    """A folder's name is claimed when it is chosen."""
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: run_folder.new_folder(), range(8)))
    assert sorted(folders) == [run_folder.RUNS / f"policy-{n}" for n in range(1, 9)]


def test_weights_are_read_before_a_simulator_is_made(work, bad, monkeypatch):
    """A broken or too small model is refused at once, not after minutes of stage 1."""
    monkeypatch.setattr(build, "make_default_simulator", lambda: 1 / 0)
    refused(policy, "--engine simulator --policy ../bad/garbled", "cannot be loaded", work.parent)
    refused(policy, "--engine simulator --max_document_tokens 2000", "positions", work.parent)


def test_a_question_whose_golds_leave_a_simulator_no_room(work):
    """The simulator's prompt holds gold answers; where they are too long, no run begins."""
    row = {"question": "who?", "answers": [f"the number {i} " * 200 for i in range(8)]}
    (work / "golds.jsonl").write_text(json.dumps(row))
    refused(policy, "--engine simulator --simulator tiny --data golds.jsonl", "positions", work)


def test_the_shipped_model_can_be_named_as_simulator(work):
    """`--simulator tiny` finds the wording beside the shipped weights."""
    config = train_policy.PolicyConfig(simulator="tiny")
    accelerator = build.make_accelerator(config)
    assert build.build_simulator(config, accelerator).template == base.SIMULATOR_PROMPT


def test_the_seed_decides_everything(work):
    """The same seed gives the same metrics and weights, another seed others."""
    for seed in "112":
        policy("--seed", seed)
    one, same, other = (work / "runs" / f"policy-{n}" for n in (1, 2, 3))
    assert metrics(one) == metrics(same) != metrics(other)
    assert weights(one / "policy") == weights(same / "policy") != weights(other / "policy")


def test_the_settings_beside_a_run_repeat_it(work):
    """config.yaml holds the settings that were used; fed back, it begins a new run with them."""
    policy("--output", "one", "--overwrite", "--seed", "5", "--kl_coef", "0")
    assert all(row["kl"] == 0 for row in metrics(work / "one"))  # there all the same
    settings = yaml.safe_load((work / "one" / "config.yaml").read_text())
    assert settings["seed"] == 5 and settings["lr"] == 0.01 and settings["steps"] == 2
    train_policy.main(["--config", "one/config.yaml"])
    assert metrics(work / "one") == metrics(work / "runs" / "policy-1")


def test_noise_follows_the_curriculum_of_the_simulator(work):
    """Noise follows method.md from the first step to the last, and reaches the simulator."""
    policy(
        "--engine",
        "simulator",
        "--simulator",
        "../base",
        "--noise_start",
        "0.1",
        "--noise_end",
        "1",
        "--noise_base",
        "4",
        "--steps",
        "3",
        "--max_document_tokens",
        "30",
    )
    rows = metrics(work / "runs" / "policy-1")
    # method.md: start + (base^(i/n) - 1) / (base - 1) * (end - start), with base 4
    expected = [0.1 + (4 ** (i / 3) - 1) / 3 * 0.9 for i in (1, 2, 3)]
    assert [row["noise"] for row in rows] == pytest.approx(expected)
    lines = (work / "runs" / "policy-1" / "trajectories.jsonl").read_text().splitlines()
    turns = [
        turn
        for line in lines
        if json.loads(line)["step"] == 3
        for turn in json.loads(line)["turns"]
        if turn["documents"] is not None
    ]
    assert turns and all(turn["noisy"] for turn in turns)


def test_the_curriculum_is_that_of_a_real_engine_too(work):
    """BM25's replies follow the curriculum; with noise 1 no reply holds the answer."""
    policy("--noise_start", "1", "--noise_end", "1")
    rows = metrics(work / "runs" / "policy-1")
    assert [row["noise"] for row in rows] == [row["noisy_replies"] for row in rows] == [1, 1]
    for line in (work / "runs" / "policy-1" / "trajectories.jsonl").read_text().splitlines():
        row = json.loads(line)
        for documents in (turn["documents"] for turn in row["turns"] if turn["documents"]):
            assert not any(row["example"]["answers"][0] in text for text in documents)


def test_checkpointed_layers_change_nothing(work):
    """Gradient checkpointing saves memory and changes the numbers by rounding only."""
    for flag in ("False", "True"):
        policy("--gradient_checkpointing", flag, "--output", flag, "--steps", "3")
    plain, checkpointed = metrics(work / "False"), metrics(work / "True")
    assert plain[2]["kl"] != 0
    for one, other in zip(plain, checkpointed, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_bfloat16_on_a_cpu(work):
    """Generation and scoring both compute in bfloat16, and the saved policy is bfloat16."""
    policy("--dtype", "bfloat16", "--steps", "2", "--algorithm", "ppo", "--eval_every", "2")
    rows = metrics(work / "runs" / "policy-1")
    assert all(0 < row["logprob_gap_max"] < 0.3 and row["grad_norm"] > 0 for row in rows)
    model = AutoModelForCausalLM.from_pretrained(work / "runs" / "policy-1" / "policy")
    assert model.dtype == torch.bfloat16


def test_bfloat16_on_a_cpu_where_it_is_faster(work, monkeypatch):
    """Where a CPU has instructions for it and the model is not small, "auto" is bfloat16."""
    monkeypatch.setattr(model_weights, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(model_weights, "WIDE", 32)
    policy("--output", "auto")
    policy("--dtype", "bfloat16", "--output", "named")
    assert metrics(work / "auto") == metrics(work / "named")
    assert weights(work / "auto/policy") == weights(work / "named/policy")


def test_settings_that_mean_what_is_there_anyway(work):
    """Naming what the automatic choice would be changes nothing."""
    policy()
    policy("--attention", "sdpa", "--dtype", "float32", "--chat_template", "none")
    assert metrics(work / "runs" / "policy-1") == metrics(work / "runs" / "policy-2")


def test_a_chat_template_can_be_left_out(work):
    """--chat_template none trains without the template, and saves the policy without it."""
    tokenizer = AutoTokenizer.from_pretrained("../base")
    tokenizer.chat_template = "{% for m in messages %}Query: {{ m['content'] }}{% endfor %}"
    shutil.copytree("../base", "chat")
    tokenizer.save_pretrained("chat")
    for setting, policy_ in (("auto", "chat"), ("none", "chat"), ("auto", "../base")):
        policy("--policy", policy_, "--chat_template", setting, "--output", setting + policy_[-4:])
    names = ("autochat", "nonechat", "autobase")
    with_it, without, plain = (metrics(work / name) for name in names)
    assert with_it != without == plain
    for name, has_template in (("autochat", True), ("nonechat", False)):
        saved = AutoTokenizer.from_pretrained(work / name / "policy")
        assert bool(saved.chat_template) == has_template


def searches(run) -> list[list[str]]:
    """What each search of a run was answered."""
    rows = map(json.loads, (run / "trajectories.jsonl").read_text().splitlines())
    turns = [turn for row in rows for turn in row["turns"]]
    return [turn["documents"] for turn in turns if turn["documents"] is not None]


def test_without_an_engine_searches_find_nothing(work):
    """With --engine none every search is answered by an empty block."""
    policy("--engine", "none", "--corpus", "", "--output", "run")
    assert searches(work / "run") and not any(searches(work / "run"))


def test_the_simulators_wording_may_be_ones_own(work, monkeypatch):
    """A --simulator_template is what the simulator is prompted with."""
    (work / "mine.txt").write_text("Query: {query} Question: {question} {quality} documents:")
    seen = []
    generate = simulator.generate

    def spied(model, prompts, *rest, **named):
        seen.extend(prompts)
        return generate(model, prompts, *rest, **named)

    monkeypatch.setattr(simulator, "generate", spied)
    flags = ["--engine", "simulator", "--simulator", "../base", "--simulator_device", "cpu"]
    policy(
        *flags, "--simulator_template", "mine.txt", "--noise_end", "0", "--simulator_contrast", "0"
    )
    texts = AutoTokenizer.from_pretrained("../base").batch_decode(seen)  # which splits off marks
    assert texts and all("Query" in text and "Answer" not in text for text in texts)
    assert all(text.endswith("useful documents :") for text in texts)
    config = train_policy.PolicyConfig(simulator="../base", simulator_template="untuned")
    template = build.build_simulator(config, build.make_accelerator(config)).template
    assert template == simulator.load_template("untuned") != base.SIMULATOR_PROMPT


def test_a_retriever_is_asked_once_for_each_query(work):
    """With --cache no query is sent twice, in a second run neither."""

    def answer(path, body, headers):
        replies = [[{"document": {"contents": f"{query} on January"}}] for query in body["queries"]]
        return 200, {"result": [rows * body["topk"] for rows in replies]}

    with serving(answer) as (url, seen):
        flags = ["--engine", "http", "--engine_url", url, "--timeout", "20", "--retries", "0"]
        for _ in range(2):
            policy(*flags, "--cache", "replies.db", "--top_k", "2", "--corpus", "")
        queries = [query for _, body in seen for query in body["queries"]]
    assert queries and len(queries) == len({*queries})
    first, second = (searches(work / "runs" / f"policy-{n}") for n in (1, 2))
    assert first == second and all(len(replies) == 2 for replies in first)


GONE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "flags",
    [
        ["--engine", "http", "--engine_url", GONE, "--on_search_error", "empty"],
        ["--engine", "simulator", "--simulator", GONE, "--simulator_model", "mine"],
    ],
)
def test_a_server_that_is_not_there_is_said_at_once(work, flags):
    """A dead address is told before a run folder is made."""
    with pytest.raises(ServiceError, match=GONE):
        policy(*flags, "--retries", "0", "--output", "nothing")
    assert not (work / "nothing").exists()


def test_a_served_simulator_may_die(work):
    """A run that loses its server is saved, and goes on with one of another address and name."""
    left = [10**9]

    def answer(path, body, headers):
        if path == "/v1/models":
            return 200, {"data": [{"id": "mine"}, {"id": "another"}]}
        left[0] -= 1
        choice = {"message": {"content": f"Doc 1: {len(body['messages'][0]['content'])} January"}}
        reply = {"choices": [choice | {"finish_reason": "stop"}]}
        return (200, reply) if left[0] >= 0 else (400, "gone")

    with serving(answer) as (url, seen):
        flags = [
            "--engine",
            "simulator",
            "--simulator",
            url,
            "--simulator_model",
            "mine",
            "--simulator_api",
            "chat",
            "--steps",
            "4",
        ]
        policy(*flags, "--output", "whole")
        posts = [(path, body) for path, body in seen if body]
        assert {path for path, _ in posts} == {"/v1/chat/completions"}
        assert {body["model"] for _, body in posts} == {"mine"}
        left[0] = len(posts) * 2 // 3
        with pytest.raises(UserError, match=url) as error:
            policy(*flags, "--output", "cut")
        left[0] = 10**9
        steps_done = len(metrics(work / "cut"))
        assert 0 < steps_done < 4
        assert f"Step {steps_done} is saved; go on with: " in str(error.value)
        assert "train_policy.py --output cut --resume" in str(error.value)
        with serving(answer) as (moved, _):  # a server may move; a model of one's own is another
            with pytest.raises(UserError, match="--simulator"):
                policy(*flags, "--output", "cut", "--resume", "--simulator", "../base")
            moved_flags = ["--simulator", moved, "--simulator_model", "another"]
            policy(*flags, "--output", "cut", "--resume", *moved_flags)
    assert metrics(work / "cut") == metrics(work / "whole")


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
    ("--policy ../bad/weightless", "no file named model.safetensors"),
    ("--policy ../bad/garbled", "cannot be loaded"),
    ("--policy ../bad/lora", "is a LoRA"),
    ("--merge True", "--lora_rank"),
    ("--attention flash_attention_2", "a CUDA device"),
    ("--engine http", "--engine_url"),
    ("--engine http --engine_url localhost:8000", "--engine_url"),
    ("--simulator_template ../nowhere.txt", "../nowhere.txt"),
    ("--engine simulator --simulator ../base --simulator_template ../corpus.txt", "{query}"),
    ("--engine simulator --simulator ../nowhere", "../nowhere"),
    ("--data ../nowhere.jsonl", "../nowhere.jsonl"),
    ("--data ../corpus.txt", "'question'"),
    ("--data ../bad/columns.jsonl", "'question'"),
    ("--data ../bad/empty.jsonl", "empty.jsonl"),
    ("--corpus ../nowhere.txt", "../nowhere.txt"),
    ("--corpus ../bad/empty.txt", "empty.txt"),
    ("--corpus ../base/model.safetensors", "is none of"),
    ("--engine simulator --data world --corpus ../nowhere.txt", "../nowhere.txt"),
    ("--group_size 1", "--group_size"),
    ("--minibatches 4", "--group_size 2"),  # it divides the batch, but not its groups
    ("--noise_end 1.5", "--noise_end"),
    ("--engine_noise 0.5", "--engine_noise"),  # which is a test's
    ("--eval_noise 1.5", "--eval_noise"),
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
    """Wrong settings are told in one sentence that names them, and no file is written."""
    refused(policy, flags, names, work.parent)


def test_bad_input_is_one_line_in_a_process(work):
    """The exit status is 2, and one line on the error output says why."""
    result = status("train_policy.py", "--steps", "-1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --steps must be 0 or more, not -1.\n"


def test_two_processes_do_what_one_does(work):
    """The metrics of two processes are those of one, up to rounding."""
    two_processes("train_policy.py", *POLICY, "--save_every", "1")
    policy("--save_every", "1")
    two, one = metrics(work / "runs" / "policy-1"), metrics(work / "runs" / "policy-2")
    assert len(two) == len(one) == 2
    for name in ("reward", "searches_per_question", "response_tokens", "entropy", "grad_norm"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3)
    assert two[1]["reward"] == pytest.approx(one[1]["reward"], abs=0.26)  # a near-tie may flip
