"""`train_policy.py --resume`: what was interrupted ends as if it had not been."""

import os
import shutil

import pytest
from scripts import (
    everything,
    metrics,
    policy,
    refused,
    weights,
)

import train_policy
from minizs.runs import run_folder


def test_a_failing_evaluation_is_made_up_for(work, monkeypatch, capsys):
    """A step whose evaluation failed is done again, once, with its held-out figures."""
    flags = ["--data", "world", "--corpus", "", "--eval_every", "3", "--save_every", "2"]
    flags += ["--eval_questions", "4", "--steps", "3", "--output"]
    with monkeypatch.context() as patch:
        patch.setattr("minizs.evaluation.held_out.held_out_test", lambda *_: lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy(*flags, "run")
    assert [row["step"] for row in metrics(work / "run")] == [1, 2]
    train_policy.main(["--output", "run", "--resume"])
    assert "Going on from step 2 of run." in capsys.readouterr().out
    policy(*flags, "whole")
    assert metrics(work / "run") == metrics(work / "whole")
    assert "held_out_f1" in metrics(work / "run")[2]


def test_a_named_checkpoint_is_its_own_runs(work):
    """A named checkpoint has to be its run's own; the run's newer checkpoints are dropped."""
    policy("--output", "run", "--save_every", "1")
    shutil.copytree(work / "run", work / "copy")
    refused(
        policy,
        "--output run --resume copy/checkpoints/step-1",
        "copy/checkpoints/step-1",
        work.parent,
    )
    policy("--resume", "run/checkpoints/step-1", "--save_every", "0")  # of a complete run
    assert sorted(p.name for p in (work / "run" / "checkpoints").iterdir()) == ["step-1"]
    assert metrics(work / "run") == metrics(work / "copy")


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(work, algorithm, monkeypatch, capsys):
    """Metrics, trajectories and weights of a resumed run are those of a run without a break."""
    flags = ["--algorithm", algorithm, "--steps", "4", "--save_every", "2", "--kl_coef", "0.1"]
    policy(*flags, "--output", "whole")
    write = run_folder.write_lines

    def killed(path, rows, *mode):
        write(path, rows, *mode)
        if path.name == "trajectories.jsonl" and rows[0]["step"] == 3:
            path.with_name("metrics.jsonl").open("a").write('{"step": 4, "rew')
            raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "write_lines", killed)
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


def test_resume_begins_a_run_where_its_settings_are_given(work, capsys):
    """A script that always resumes begins its run so, and says whether there was one."""
    policy("--resume")
    sentence = "There is no run in runs/policy-1 to resume: a new run begins there."
    assert sentence in capsys.readouterr().out
    assert [row["step"] for row in metrics(work / "runs" / "policy-1")] == [1, 2]
    shutil.rmtree(work / "runs" / "policy-1" / "policy")
    policy("--resume", "--save_every", "1")
    sentence = "No step of runs/policy-1 is saved: it begins again with step 1."
    assert sentence in capsys.readouterr().out
    assert [row["step"] for row in metrics(work / "runs" / "policy-1")] == [1, 2]
    assert not (work / "runs" / "policy-2").exists()


@pytest.mark.parametrize("flags", ["", "--output runs/polcy-1", "--output x --threads 1 --keep=3"])
def test_resume_without_a_run_and_without_settings_is_refused(work, flags):
    """The path is probably mistyped; another experiment with default settings helps nobody."""

    def resume(*given):
        train_policy.main(["--resume", *given])

    refused(resume, flags, "There is no run in", work)


def test_an_edited_config_is_noticed(work):
    """The checkpoint remembers what its weights were trained with; bookkeeping may be edited."""
    policy("--output", "run", "--save_every", "1", "--steps", "3")
    shutil.rmtree(work / "run" / "policy")
    shutil.rmtree(work / "run" / "checkpoints" / "step-3")
    path = work / "run" / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("lr: 0.01\n", "lr: 0.02\n"))

    def resume(*given):
        train_policy.main(["--output", "run", "--resume", *given])

    refused(resume, "", "--lr was 0.01 and is 0.02", work)
    path.write_text(text.replace("keep: 2\n", "keep: 9\n"))
    resume()
    assert len(list((work / "run" / "checkpoints").iterdir())) == 2


def test_a_checkpoint_holds_what_is_read_of_it(work):
    """Weights, optimiser, settings and checksums, and no pickle of random states."""
    policy("--output", "run", "--save_every", "1", "--steps", "1")
    names = sorted(path.name for path in (work / "run" / "checkpoints" / "step-1").iterdir())
    assert names == ["checksums.json", "config.yaml", "model.safetensors", "optimizer.bin"]


def test_overwrite_begins_anew(work):
    """--overwrite leaves nothing of the old run's logs and checkpoints."""
    policy("--output", "here", "--save_every", "1")
    policy("--output", "here", "--overwrite", "--steps", "1")
    assert len(metrics(work / "here")) == 1
    assert not (work / "here" / "checkpoints").exists()
