"""Commands in messages."""

import shlex
from pathlib import Path

from minizs.runs.advice import ROOT, command


def test_a_command_survives_the_shell(tmp_path, monkeypatch):
    """What a shell makes of the command are the arguments that were meant, spaces included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = shlex.split(
        command("evaluate.py", "--policy", Path("my runs", "a'b"), "--questions", 5)
    )
    assert words[0] == "python" and Path(words[1]).is_file()
    assert words[2:] == ["--policy", "my runs/a'b", "--questions", "5"]


def test_in_the_repository_the_script_has_no_folder(monkeypatch):
    """There the command is the one that the README shows."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("train_policy.py", "--resume") == "accelerate launch train_policy.py --resume"
