"""The warm start: sources of demonstrations, supervised steps, what is measured, and resuming."""

import json
import re
import shlex
import signal
from pathlib import Path

import pytest
import yaml
from scripts import POLICY, everything, metrics, policy, refused, two_processes, weights

import train_policy
from minizs import UserError, sft
from minizs.evaluation.scores import from_row
from minizs.imitation.demonstrations import split_held_out
from minizs.imitation.warm_start import warm_start
from minizs.models import loading
from minizs.runs import build, data
from minizs.runs.flags import parse
from minizs.runs.run_folder import read_lines
from minizs.runs.settings import PolicyConfig

FLAGS = """--warm_start_steps 6 --warm_start_tokens 400 --warm_start_lr 0.01 --save_every 2
    --warm_start_held_out 0.3 --max_turn_tokens 40 --top_k 1 --noise_start 0.2
    --noise_end 0.2""".split()


def run(folder: str, *flags: str):
    """A warm start in this folder, as train_policy.py makes it. Returns the result's path."""
    config = parse(PolicyConfig, [*POLICY, *FLAGS, *flags, "--output", folder])
    accelerator = build.make_accelerator(config)
    examples = data.load_examples(config.data, "train")
    engine = build.build_engine(config, "train", accelerator, examples)
    model, tokenizer = build.load_trainable(config, accelerator)
    template = loading.load_prompt(config.policy)
    policy = build.make_policy(config, model, tokenizer, template, 0.0)
    result = Path(warm_start(config, accelerator, policy, engine, examples))
    assert not accelerator._models and not accelerator._optimizers
    return result


def demonstrations(folder: str) -> list[dict]:
    return read_lines(Path(folder, "warm_start/demonstrations.jsonl"))


def report(folder: str) -> dict:
    return json.loads(Path(folder, "warm_start/report.json").read_text())


def test_scripted_demonstrations_are_learned(work, capsys):
    """No model is needed for them; the loss on held-out ones falls, valid actions and F1 are
    measured before and after, and the result is a model folder with the policy's prompt."""
    result = run("warm", "--warm_start", "scripted", "--warm_start_steps", "40")
    assert result == Path("warm/warm_start/policy")
    model, tokenizer = loading.load_model(str(result))
    assert loading.load_prompt(str(result)) == loading.load_prompt("../base")
    assert weights(result) != weights(work.parent / "base")
    before, after = report("warm")["before"], report("warm")["after"]
    assert after["loss"] < 0.6 * before["loss"]
    assert 0 <= before["valid_rate"] <= after["valid_rate"] <= 1
    assert 0 <= before["f1"] <= 1 and 0 <= after["f1"] <= 1
    assert [row["step"] for row in read_lines(Path("warm/warm_start/metrics.jsonl"))] == [
        *range(1, 41)
    ]
    for row in demonstrations("warm"):
        assert row["reward"] == 1 and row["turns"][0]["action"] == "search"
        assert len(row["ids"]) == len(row["loss_mask"]) and any(row["loss_mask"])
    out = capsys.readouterr().out
    assert "demonstrations are taken" in out and "were valid before" in out


def test_the_loss_is_that_of_the_held_out_demonstrations(work):
    """The loss before is that of the base model, per token of its own, on questions that are not
    learned from."""
    result = run("warm", "--warm_start", "scripted")
    rows = demonstrations("warm")
    learned, held_out = split_held_out([from_row(row) for row in rows], 0.3)
    assert learned and held_out
    for name, figures in (("../base", report("warm")["before"]), (result, report("warm")["after"])):
        model, _ = loading.load_model(str(name))
        loss, count = sft.nll(model, *sft.collate([(row.ids, row.loss_mask) for row in held_out]))
        assert figures["loss"] == pytest.approx((loss / count).item(), rel=1e-4)


def test_a_file_of_another_model_is_learned(work):
    """Demonstrations of a file replace those of a script, whatever wrote it."""
    run("scripted", "--warm_start", "scripted")
    rows = [row | {"ids": [1], "loss_mask": [1]} for row in demonstrations("scripted")]
    Path("theirs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("warm", "--warm_start", "theirs.jsonl")
    assert demonstrations("warm") == [
        row | {"example": row["example"] | {"source": row["example"]["source"]}}
        for row in demonstrations("scripted")
    ]
    assert weights(Path("warm/warm_start/policy")) == weights(Path("scripted/warm_start/policy"))


def test_own_right_answers_are_learned(work):
    """They come from the policy's own rollouts, several tries at each question, and have reward 1
    and a search."""
    run("warm", "--warm_start", "own", "--group_size", "8")
    rows = demonstrations("warm")
    assert rows and len({row["example"]["question"] for row in rows}) < len(rows)
    for row in rows:
        assert row["reward"] == 1 and row["turns"][0]["action"] == "search"


def test_bad_files_are_refused_before_anything_is_trained(work):
    """A file that holds no demonstration is one sentence, and no model is there."""
    with pytest.raises(UserError, match="nowhere.jsonl.*--warm_start"):
        run("warm", "--warm_start", "nowhere.jsonl")
    with pytest.raises(UserError, match="Row 1 of ../questions.jsonl is no demonstration"):
        run("warm", "--warm_start", "../questions.jsonl")
    assert not Path("warm/warm_start/policy").exists()


def test_limits_without_room_are_named(work):
    """Where no demonstration fits, the sentence names the limits."""
    with pytest.raises(UserError, match="nothing to imitate.*exceed --max_turns"):
        run("warm", "--warm_start", "scripted", "--max_turn_tokens", "5")


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_it_goes_on_where_it_was_stopped(work, monkeypatch, number):
    """A kill or a signal in the middle of the steps costs nothing but the steps since the last
    checkpoint: the weights are those of an unbroken warm start, and what is whole is not made
    again."""
    run("whole", "--warm_start", "scripted")
    collate = sft.collate
    calls = iter(range(10**6))

    def patched(*arguments):
        if next(calls) == 6:
            if number is None:
                raise MemoryError
            signal.raise_signal(number)
        return collate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "collate", patched)
        with pytest.raises(MemoryError if number is None else SystemExit) as stop:
            run("warm", "--warm_start", "scripted")
    if number is not None:
        assert "Go on with: " in str(stop.value) and "--output warm --resume" in str(stop.value)
    assert (
        list(Path("warm/warm_start/checkpoints").glob("step-*"))
        and not Path("warm/warm_start/policy").exists()
    )
    with monkeypatch.context() as patch:
        patch.setattr("minizs.imitation.warm_start.search_plainly", lambda *_, **__: pytest.fail())
        result = run("warm", "--warm_start", "scripted")
    assert weights(result) == weights(Path("whole/warm_start/policy"))
    assert read_lines(Path("warm/warm_start/metrics.jsonl")) == read_lines(
        Path("whole/warm_start/metrics.jsonl")
    )
    assert report("warm") == report("whole")
    before = weights(result)
    run("warm", "--warm_start", "scripted")  # which has nothing left to do
    assert weights(result) == before


def test_a_lora_is_merged(work):
    """With a LoRA the result is a whole model all the same, from which a new LoRA can start."""
    result = run("warm", "--warm_start", "scripted", "--lora_rank", "4")
    assert weights(result) != weights(work.parent / "base")
    assert (result / "config.json").is_file() and not (result / "adapter_config.json").exists()


def test_nothing_is_held_out_where_none_is_wanted(work, capsys):
    """Then all demonstrations are learned from, and nothing is measured."""
    run("warm", "--warm_start", "scripted", "--warm_start_held_out", "0")
    assert not Path("warm/warm_start/report.json").exists()
    assert "were valid" not in capsys.readouterr().out


def test_the_share_of_noise_is_that_of_the_run(work):
    """Demonstrations meet the noise that training will bring: the mean of its curriculum."""
    curriculum = ["--noise_end", "1", "--steps", "2"]
    run("warm", "--warm_start", "own", "--group_size", "20", *curriculum)
    [log] = Path("warm/warm_start").glob("played.*")
    turns = [turn for row in read_lines(log) for turn in row["turns"] if turn["documents"]]
    share = sum(turn["noisy"] for turn in turns) / len(turns)
    # 0.5 in the first step and 1 in the second: 0.75
    assert len(turns) > 30 and 0.6 < share < 0.9


def test_a_warm_start_can_be_all_there_is(work):
    """Without any step of reinforcement learning the policy is that of the warm start, and a run
    that is complete is left as it is."""
    flags = [*FLAGS, "--warm_start", "scripted", "--steps", "0", "--output", "run"]
    policy(*flags)
    assert weights(Path("run/policy")) == weights(Path("run/warm_start/policy"))
    assert weights(Path("run/policy")) != weights(work.parent / "base")
    assert rows_of("run") == [] and Path("run/report.html").is_file()
    before = everything(Path("run"))
    policy(*flags, "--resume")
    assert everything(Path("run")) == before


def rows_of(run: str) -> list[dict]:
    """The lines of metrics, without what a clock says."""
    return metrics(Path(run))


WARM = [*FLAGS, "--warm_start", "scripted", "--save_every", "1"]


def test_reinforcement_learning_starts_from_the_warm_policy(work):
    """The first step of RL is played by the warm policy, which is also the KL's reference; the run
    ends with a policy of its own, and its settings still name the first model."""
    policy(*WARM, "--minibatches", "1", "--output", "run")
    settings = yaml.safe_load(Path("run/config.yaml").read_text())
    assert settings["policy"] == "../base" and settings["warm_start"] == "scripted"
    warm = str(work / "run/warm_start/policy")
    policy(
        *FLAGS, "--minibatches", "1", "--save_every", "1", "--policy", warm, "--output", "by-hand"
    )
    assert rows_of("run") == rows_of("by-hand")
    assert rows_of("run")[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert weights(Path("run/policy")) == weights(Path("by-hand/policy"))
    assert weights(Path("run/policy")) != weights(Path(warm))


@pytest.mark.parametrize("in_warm_start", [True, False])
def test_a_run_with_a_warm_start_is_resumed(work, monkeypatch, in_warm_start):
    """Stopped in the warm start or after it, the advised command ends with the metrics and the
    weights of an unbroken run."""
    policy(*WARM, "--output", "whole")
    steps = iter(range(10**6))
    place = sft if in_warm_start else train_policy
    name = "collate" if in_warm_start else "f1_score"
    original = getattr(place, name)

    def stopped(*arguments):
        if next(steps) == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stopped)
        with pytest.raises(SystemExit) as stop:
            policy(*WARM, "--output", "my run")
    assert Path("my run/warm_start/policy").exists() != in_warm_start
    advised = shlex.split(re.search(r"with: (.*)", str(stop.value))[1])
    assert "my run" in advised
    train_policy.main(advised[2:])
    assert rows_of("my run") == rows_of("whole")
    assert weights(Path("my run/policy")) == weights(Path("whole/policy"))


def test_a_lora_of_a_warm_policy_is_merged(work):
    """The final model is the warm policy with the LoRA of reinforcement learning."""
    policy(*WARM, "--output", "run", "--lora_rank", "4", "--merge")
    model, _ = loading.load_model("run/policy")
    assert not Path("run/policy/adapter_config.json").exists()
    assert weights(Path("run/policy")) != weights(Path("run/warm_start/policy"))


def test_two_processes_warm_a_policy(work):
    """They share demonstrations and batches, and end with one policy."""
    two_processes("train_policy.py", *POLICY, *WARM, "--output", "two")
    policy(*WARM, "--output", "one")
    assert demonstrations("two") == demonstrations("one")
    one, two = report("one")["after"], report("two")["after"]
    assert one["loss"] == pytest.approx(two["loss"], rel=0.02)
    assert Path("two/policy/prompt.txt").is_file()


def test_bad_files_leave_no_folder(work):
    """A file that cannot be imitated is refused before the run's folder is made."""
    refused(policy, "--warm_start nowhere.jsonl --output run", "nowhere.jsonl", work)
    refused(policy, "--warm_start ../questions.jsonl --output run", "Row 1", work)
