"""Settings: how flags and files become a dataclass, what is refused, how a script ends."""

import errno
import os
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest

import evaluate
import train_policy
import train_sim
from minizs import UserError
from minizs.runs import flags
from minizs.runs.flags import option, parse

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = (train_sim.SimConfig, train_policy.PolicyConfig, evaluate.EvalConfig)
# Those in configs/accelerate/ are read by Accelerate.
CONFIGS = [path for path in ROOT.glob("configs/**/*.yaml") if path.parent.name != "accelerate"]


@dataclass
class Lengths:
    """How long it takes."""

    steps: int = option(60, "The number of steps.", min=1)
    lr: float = option(1e-3, "The learning rate.", above=0)
    share: float = option(0.5, "A share of 100%.", min=0, max=1)
    limit: int = option(0, "No more than ten.", max=10, may_change=True)


@dataclass
class Places:
    """Where it goes."""

    name: str = option("a", "A name.", metavar="NAME")
    overwrite: bool = option(False, "Lose what is there.", may_change=True)
    resume: str = option("", "A checkpoint.", bare="latest")
    kind: str = option("grpo", "A kind.", ("grpo", "ppo"))


@dataclass
class Settings(Lengths, Places):
    """What a script would have."""

    steps: int = option(30, "The number of steps, fewer than usual.", min=1)


def from_yaml(tmp_path, text: str, *flags: str) -> Settings:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return parse(Settings, ["--config", str(path), *flags])


def test_each_flag_sets_its_own_field():
    """Values have the type of their field, and what no flag names keeps its default."""
    assert parse(Settings, []) == Settings()
    settings = parse(Settings, ["--steps", "5", "--lr", "1e-4", "--overwrite", "--kind", "ppo"])
    assert settings == Settings(steps=5, lr=1e-4, overwrite=True, kind="ppo")
    assert parse(Settings, ["--overwrite", "no", "--resume"]) == Settings(resume="latest")
    assert parse(Settings, ["--resume", "step-3"]).resume == "step-3"


def test_a_flag_wins_over_the_file(tmp_path):
    """The command line is what a run does; the file fills in the rest."""
    settings = from_yaml(tmp_path, "steps: 7\nlr: 2e-4\nresume: there\n", "--steps", "9")
    assert settings == Settings(steps=9, lr=2e-4, resume="there")
    assert from_yaml(tmp_path, "lr: 1") == Settings(lr=1.0)
    assert from_yaml(tmp_path, "") == Settings()


def test_saved_settings_fill_in_where_no_file_is_named(tmp_path):
    """A resumed run has its own settings; `--config` takes their place, and a flag wins."""
    saved = tmp_path / "config.yaml"
    assert parse(Settings, [], saved) == Settings()
    saved.write_text("steps: 7\nlr: 0.5\n")
    assert parse(Settings, ["--lr", "0.1"], saved) == Settings(steps=7, lr=0.1)
    other = tmp_path / "other.yaml"
    other.write_text("steps: 8\n")
    assert parse(Settings, ["--config", str(other)], saved) == Settings(steps=8)


def test_an_unknown_flag_is_refused():
    """A typo or an abbreviation must not train with the default for hours."""
    for argv in (["--stepz", "5"], ["--step", "5"], ["5"]):
        with pytest.raises(UserError):
            parse(Settings, argv)


@pytest.mark.parametrize(
    "argv",
    [["--steps", "many"], ["--lr", "x"], ["--kind", "dpo"], ["--steps"], ["--overwrite", "7"]],
)
def test_a_wrong_value_is_refused_in_one_sentence(argv):
    """The sentence names the flag; argparse would print its usage and exit."""
    with pytest.raises(UserError) as error:
        parse(Settings, argv)
    assert argv[0] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ("--steps 0", "--steps must be 1 or more, not 0."),
        ("--lr 0", "--lr must be greater than 0, not 0.0."),
        ("--share 1.5", "--share must be from 0 to 1, not 1.5."),
        ("--share -1", "--share must be from 0 to 1, not -1.0."),
        ("--limit 11", "--limit must be 10 or less, not 11."),
        ("--lr nan", "--lr nan is too large, or no number; give another."),
        ("--lr inf", "--lr inf is too large, or no number; give another."),
        ("--lr 1e30", "--lr 1e+30 is too large, or no number; give another."),
        (f"--limit {10**20}", f"--limit {10**20} is too large, or no number; give another."),
    ],
)
def test_a_number_out_of_range_is_refused(argv, sentence):
    """The range is that of the field. NaN would pass each comparison; torch has 64 bits."""
    with pytest.raises(UserError) as error:
        parse(Settings, argv.split())
    assert str(error.value) == sentence


def test_the_ends_of_a_range_are_in_it():
    """`min` and `max` are allowed themselves, `above` is not."""
    settings = parse(Settings, "--steps 1 --share 0 --limit 10".split())
    assert (settings.steps, settings.share, settings.limit) == (1, 0.0, 10)
    assert parse(Settings, ["--share", "1"]).share == 1.0


@pytest.mark.parametrize("kind", SCRIPTS)
def test_every_number_of_the_scripts_has_a_range(kind):
    """A setting that means nothing would fail hours later, or worse, not fail."""
    for name, value in vars(kind()).items():
        if type(value) in (int, float) and name != "seed":
            with pytest.raises(UserError, match=f"--{name} must be"):
                parse(kind, [f"--{name}=-1"])


@pytest.mark.parametrize("kind", SCRIPTS)
def test_every_help_line_is_a_sentence(kind):
    """It begins with a capital letter, ends with a full stop and has more than two words."""
    for field in fields(kind):
        line = field.metadata["help"]
        assert line[0].isupper() and line.endswith(".") and len(line.split()) > 2, field.name


@pytest.mark.parametrize(
    "text, words",
    [
        ("stepz: 5", "--stepz"),
        ("steps: many", "invalid int value"),
        ("steps: 1.5", "invalid int value"),
        ("steps: true", "invalid int value"),
        ("lr: true", "invalid float value"),
        ("lr: fast", "invalid float value"),
        ("lr: -1", "--lr must be greater than 0"),
        ("steps:", "no value"),
        ("overwrite: 7", "rgument --overwrite"),
        ("kind: dpo", "choose from"),
        ("- steps", "should hold lines"),
        ("a: b: c", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, words):
    """The sentence names the file and what is wrong in it."""
    with pytest.raises(UserError, match=words) as error:
        from_yaml(tmp_path, text)
    assert "my.yaml" in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    """A wrong path is one sentence."""
    with pytest.raises(UserError, match="cannot be read"):
        parse(Settings, ["--config", str(tmp_path / "no.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_read(path):
    """Each file in configs/ is accepted by its script, and one with sections by all of them."""
    kinds = [train_policy.PolicyConfig]
    if path.name.startswith("simulator_"):
        kinds = [train_sim.SimConfig]
    if "\ntrain_policy:" in path.read_text():
        kinds = SCRIPTS
    for kind in kinds:
        assert parse(kind, ["--config", str(path)]) != kind() or path.stem == "tiny"


@pytest.mark.parametrize("name", ["one_gpu", "simulator_3b", "simulator_7b", "simulator_14b"])
def test_the_first_stage_of_a_recipe_may_start(name, tmp_path, monkeypatch):
    """Its limits are those of its own model, and not of the tiny policy, which does not search."""
    monkeypatch.chdir(tmp_path)
    [path] = [path for path in CONFIGS if path.stem == name]
    train_sim.check_settings(parse(train_sim.SimConfig, ["--config", str(path)]))
    with pytest.raises(UserError, match="positions of tiny"):
        flags = ["--config", str(path), "--searcher", "policy", "--max_context", "3072"]
        train_sim.check_settings(parse(train_sim.SimConfig, flags))


class Searching(Settings):
    SCRIPT = "train_policy"


def test_a_file_serves_several_scripts(tmp_path):
    """A script reads what stands outside all sections and its own section, which wins; a setting in
    another's section need not be one of its own. A flag wins over both."""
    path = tmp_path / "my.yaml"
    path.write_text("lr: 0.1\nsteps: 7\ntrain_sim: {base: b}\ntrain_policy:\n  steps: 8\n")
    config = parse(Searching, ["--config", str(path)])
    assert (config.lr, config.steps) == (0.1, 8)
    assert parse(Searching, ["--config", str(path), "--steps", "9"]).steps == 9
    assert flags.given(Searching, ["--config", str(path)]) == {"lr", "steps"}
    assert parse(Settings, ["--config", str(path)]).steps == 7


def test_a_section_may_be_empty(tmp_path):
    """As one is whose lines are all commented out."""
    path = tmp_path / "my.yaml"
    path.write_text("train_sim:\n  # steps: 3\ntrain_policy:\nevaluate: {}\n")
    assert parse(Searching, ["--config", str(path)]) == Searching()


@pytest.mark.parametrize(
    "text, words",
    [
        ("train_policy: {stepz: 5}", "my.yaml, for train_policy: .*--stepz"),
        ("evaluate: {question: 60}", "my.yaml, for evaluate: .*--question=60"),
        ("train_sim: {batch_tokens: 0}", "my.yaml, for train_sim: .*--batch_tokens"),
        ("train_sim: {examples: many}", "my.yaml, for train_sim: .*--examples"),
        ("train_sim: {lr: }", "lr no value or many"),
        ("train_sim: {base: b}\nlength: 3", "my.yaml, for train_sim: .*--length"),
        (
            "steps: 3\nevaluate: {questions: 60}",
            "steps stands outside.*evaluate has no such.*section train_sim or train_policy",
        ),
        ("ask: why\ntrain_sim: {base: b}", "train_sim has no such setting.*section evaluate"),
        ("train_policy: 5", "section train_policy holds no settings"),
        ("train_sim: [a]", "section train_sim holds no settings"),
        ("train_sims: {steps: 5}", "train_sims no value or many.*call it train_sim, "),
    ],
)
def test_a_wrong_section_is_refused(tmp_path, text, words):
    """The sentence names the file and what is wrong in it, in whichever script's section it is: a
    script that reads the file hours later would be too late."""
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        parse(Searching, ["--config", str(path)])
    assert "my.yaml" in str(error.value)


def test_what_is_saved_is_read_again(tmp_path):
    """A run can be repeated from the settings beside its results."""
    settings = Settings(steps=3, lr=1e-5, overwrite=True, name="yes")
    flags.save_settings(settings, tmp_path / "config.yaml")
    assert asdict(parse(Settings, ["--config", str(tmp_path / "config.yaml")])) == asdict(settings)


def test_saved_settings_stand_in_the_order_of_the_groups(tmp_path):
    """A person reads the file, too: what belongs together stands together."""
    flags.save_settings(Settings(), tmp_path / "config.yaml")
    names = [line.split(":")[0] for line in (tmp_path / "config.yaml").read_text().splitlines()]
    assert names == "steps lr share limit name overwrite resume kind".split()


def test_help_shows_each_setting_under_the_heading_of_its_group(capsys):
    """With its line and its default; a redefined setting stays in its group."""
    with pytest.raises(SystemExit):
        parse(Settings, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    places = [
        text.index(words)
        for words in (
            "What a script would have.",
            "How long it takes: --steps N The number of steps, fewer than usual. [30]",
            "--share X A share of 100%. [0.5]",
            "--limit N No more than ten. [0]",
            "Where it goes: --name NAME A name. [a]",
            "--overwrite [true|false] Lose what is there.",
            "--resume [TEXT] A checkpoint.",
            "--kind grpo|ppo A kind. [grpo]",
        )
    ]
    assert places == sorted(places)


def test_a_field_says_whether_a_resumed_run_may_change_it():
    """Only such settings may differ from those that the run began with."""
    assert flags.may_change(Settings()) == {"limit", "overwrite"}


def test_a_users_error_is_one_line(capsys):
    """A UserError is one sentence and exit status 2; an error in the code keeps its traceback."""

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
    """A full disk, a closed folder or too large a model is one sentence with advice."""

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        flags.run_script(main, settings=train_policy.PolicyConfig)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert words in said


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("text", ["No space left on device", "out of memory", "logits are NaN"])
def test_advised_flags_exist(kind, text):
    """A script advises only flags that it has: evaluate.py has no --resume, for instance."""
    advice = flags.machine_advice(RuntimeError(text), kind)
    names = {field.name for field in fields(kind)}
    assert advice and set(re.findall(r"--(\w+)", advice)) <= names


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk(capsys):
    """The message of a really full device is recognised."""
    with pytest.raises(SystemExit):
        flags.run_script(lambda _: flags.save_settings(Settings(), Path("/dev/full")))
    assert "the disk is full" in capsys.readouterr().err


def test_ctrl_c_is_one_line(capsys):
    """Ctrl-C is what the user wanted: no traceback, and the exit status of a shell."""

    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        flags.run_script(main)
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("said, status", [("Stopped after step 3.", 1), (None, 0), (7, 7)])
def test_one_of_several_processes_leaves_at_once(said, status):
    """The group's threads still run, so Python's own way out could abort or hang."""
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
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert (process.returncode, process.stdout) == (status, "done")
    assert process.stderr.splitlines()[-1:] == ([said] if isinstance(said, str) else [])


def test_a_warning_is_a_sentence(capsys, monkeypatch):
    """Ours names no line of code; those of other packages stay as they are."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # restored afterwards

    def main(argv):
        warnings.warn_explicit("It is kept in memory.", UserWarning, flags.__file__, 1)
        warnings.warn_explicit("Odd.", UserWarning, "/elsewhere/code.py", 7)

    flags.run_script(main, [])
    first, second = capsys.readouterr().err.splitlines()
    assert first == "Warning: It is kept in memory."
    assert second == "/elsewhere/code.py:7: UserWarning: Odd."
