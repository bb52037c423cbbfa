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
from minizs.runs import build, run_folder


def test_a_failing_evaluation_is_made_up_for(work, monkeypatch, capsys):
    """Guards a line without its held-out figures, and a step that was learned twice."""
    flags = ["--data", "world", "--corpus", "", "--eval_every", "3", "--save_every", "2"]
    flags += ["--eval_questions", "4", "--steps", "3", "--output"]
    with monkeypatch.context() as patch:
        patch.setattr(build, "held_out", lambda *_: lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy(*flags, "run")
    assert [row["step"] for row in metrics(work / "run")] == [1, 2]
    train_policy.main(["--output", "run", "--resume"])
    assert "Going on from step 2 of run." in capsys.readouterr().out
    policy(*flags, "whole")
    assert metrics(work / "run") == metrics(work / "whole")
    assert "held_out_f1" in metrics(work / "run")[2]


def test_a_named_checkpoint_is_its_own_runs(work):
    """Guards two runs mixed in a folder, newer checkpoints of a path not taken, a silent no."""
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
    """Guards lost optimiser state, repeated data or noise, doubled lines, a moved KL reference."""
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


def test_resume_without_a_checkpoint_starts_at_step_one(work, capsys):
    """Guards a restart script that fails the first time, or numbers a new folder every time."""
    policy("--resume")
    assert capsys.readouterr().out.splitlines()[1] == "A new run in runs/policy-1."
    assert [row["step"] for row in metrics(work / "runs" / "policy-1")] == [1, 2]
    shutil.rmtree(work / "runs" / "policy-1" / "policy")
    policy("--resume", "--save_every", "1")  # no checkpoint: again from step 1
    assert [row["step"] for row in metrics(work / "runs" / "policy-1")] == [1, 2]
    assert not (work / "runs" / "policy-2").exists()


def test_overwrite_begins_anew(work):
    """Guards a new run whose logs and checkpoints are mixed with those of an old one."""
    policy("--output", "here", "--save_every", "1")
    policy("--output", "here", "--overwrite", "--steps", "1")
    assert len(metrics(work / "here")) == 1
    assert not (work / "here" / "checkpoints").exists()
