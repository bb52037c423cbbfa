"""Settings from flags and files."""

import errno
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from minizs import UserError
from minizs.runs import flags
from minizs.runs.flags import option, parse

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Settings:
    steps: int = option(60, "Steps.")
    lr: float = option(1e-3, "Rate.")
    name: str = option("a", "Name.")
    overwrite: bool = option(False, "Lose what is there.")
    resume: str = option("", "Checkpoint.")
    kind: str = option("grpo", "Kind.", ("grpo", "ppo"))


def from_yaml(tmp_path, text: str, *flags: str) -> Settings:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return parse(Settings, ["--config", str(path), *flags])


def test_defaults_and_flags():
    """Guards flags that reach another setting (D17), or arrive as text."""
    assert parse(Settings, []) == Settings()
    settings = parse(Settings, ["--steps", "5", "--lr", "1e-4", "--overwrite", "--kind", "ppo"])
    assert settings == Settings(steps=5, lr=1e-4, overwrite=True, kind="ppo")


def test_a_flag_wins_over_the_file(tmp_path):
    """Guards an experiment that runs with other numbers than its command line says."""
    settings = from_yaml(tmp_path, "steps: 7\nlr: 2e-4\nresume: there\n", "--steps", "9")
    assert settings == Settings(steps=9, lr=2e-4, resume="there")
    assert from_yaml(tmp_path, "lr: 1") == Settings(lr=1.0)
    assert from_yaml(tmp_path, "") == Settings()


def test_an_unknown_flag_is_refused():
    """Guards a typo, or an abbreviation, that trains with the default for hours."""
    for argv in (["--stepz", "5"], ["--step", "5"], ["5"]):
        with pytest.raises(UserError):
            parse(Settings, argv)


@pytest.mark.parametrize(
    "argv",
    [["--steps", "many"], ["--lr", "x"], ["--kind", "dpo"], ["--steps"], ["--overwrite", "7"]],
)
def test_a_wrong_value_is_refused_in_one_sentence(argv):
    """Guards argparse's usage page and exit, and values outside the choices."""
    with pytest.raises(UserError) as error:
        parse(Settings, argv)
    assert argv[0] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("stepz: 5", "--stepz"),
        ("steps: many", "invalid int value"),
        ("steps: 1.5", "invalid int value"),
        ("steps: true", "invalid int value"),
        ("lr: true", "invalid float value"),
        ("lr: fast", "invalid float value"),
        ("steps:", "no value"),
        ("overwrite: 7", "rgument --overwrite"),
        ("kind: dpo", "choose from"),
        ("- steps", "should hold lines"),
        ("a: b: c", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, words):
    """Guards settings that a file gets wrong in silence."""
    with pytest.raises(UserError, match=words) as error:
        from_yaml(tmp_path, text)
    assert "my.yaml" in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    """Guards a traceback for a wrong path."""
    with pytest.raises(UserError, match="cannot be read"):
        parse(Settings, ["--config", str(tmp_path / "no.yaml")])


def test_what_is_saved_is_read_again(tmp_path):
    """Guards a run that cannot be repeated from the settings beside its results."""
    settings = Settings(steps=3, lr=1e-5, overwrite=True, name="yes")
    flags.save(settings, tmp_path / "config.yaml")
    assert asdict(parse(Settings, ["--config", str(tmp_path / "config.yaml")])) == asdict(settings)


def test_help_is_there_for_every_setting(capsys):
    """Guards a flag that cannot be found."""
    with pytest.raises(SystemExit):
        parse(Settings, ["--help"])
    text = capsys.readouterr().out
    for name in asdict(Settings()):
        assert f"--{name}" in text
    assert "Lose what is there." in text


def test_a_users_error_is_one_line(capsys):
    """Guards a traceback where one sentence says what to do; other errors keep theirs."""

    def main(argv):
        flags.require(argv == [], "Give no arguments.")
        raise KeyError("a bug")

    with pytest.raises(SystemExit) as stop:
        flags.run_script(main, ["x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: Give no arguments.\n"
    with pytest.raises(KeyError):
        flags.run_script(main, [])


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run"), "'run'; the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected"), "disk is full"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "run"), "another --output"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "run"), "another --output"),
        (MemoryError(), "error: MemoryError; lower"),
        (RuntimeError("CUDA out of memory. Tried\nto allocate"), "Tried to allocate; lower"),
    ],
)
def test_what_the_machine_lacks_is_one_line(capsys, error, words):
    """Guards a traceback for a full disk, a closed folder or too large a model."""

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        flags.run_script(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert words in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk(capsys):
    """Guards a message of the system's that is not recognised."""
    with pytest.raises(SystemExit):
        flags.run_script(lambda _: flags.save(Settings(), Path("/dev/full")))
    assert "the disk is full" in capsys.readouterr().err


def test_ctrl_c_is_one_line(capsys):
    """Guards a traceback of forty lines for what the user wanted."""

    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        flags.run_script(main)
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("said, status", [("Stopped after step 3.", 1), (None, 0), (7, 7)])
def test_one_of_several_processes_leaves_at_once(said, status):
    """Guards an abort, or a hang, in Python's own way out: the group's threads still run."""
    script = f"""
import atexit, os, torch
from minizs.runs.flags import run_script
def main(argv):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    atexit.register(os.abort)
    print("done", end="")
    raise SystemExit({said!r})
run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (status, "done")
    assert done.stderr.splitlines()[-1:] == ([said] if isinstance(said, str) else [])


@pytest.mark.parametrize("flags", ["--lr nan", "--lr inf", "--lr 1e30", "--steps -9" + "9" * 19])
def test_numbers_that_are_none(flags):
    """Guards NaN, which passes a check for what is too small, and seeds that torch cannot take."""
    with pytest.raises(UserError, match="too large, or no number"):
        parse(Settings, flags.split())
