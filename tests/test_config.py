"""Settings from flags and files."""

from dataclasses import asdict, dataclass

import pytest

from minizs import config
from minizs.config import UserError, option, parse


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
    config.save(settings, tmp_path / "config.yaml")
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
        config.require(argv == [], "Give no arguments.")
        raise KeyError("a bug")

    with pytest.raises(SystemExit) as stop:
        config.run_script(main, ["x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: Give no arguments.\n"
    with pytest.raises(KeyError):
        config.run_script(main, [])
