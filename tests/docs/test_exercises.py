"""docs/exercises.md and its tests agree, and an exercise that is not done says so in a sentence."""

import inspect
import re
from pathlib import Path

import exercises
import pytest

PAGE = Path(__file__).parent.parent.parent / "docs/exercises.md"
TESTS = {name: test for name, test in vars(exercises).items() if name.startswith("test_")}
ALONE = [name for name, test in TESTS.items() if not inspect.signature(test).parameters]


def test_every_exercise_has_tests_and_every_test_an_exercise():
    """Guards a `-k` word that selects nothing, and tests that the page does not speak of."""
    words = re.findall(r"^## \d.*\(`-k (\w+)`\)", PAGE.read_text(), flags=re.MULTILINE)
    assert len(words) == 5
    for name in TESTS:
        assert sum(word in name for word in words) == 1, name
    for word in words:
        assert sum(word in name for name in TESTS) >= 2, word


def test_the_files_to_change_are_there():
    """Guards a page that sends its reader to a file or a name of long ago."""
    text, root = PAGE.read_text(), PAGE.parent.parent
    for path in re.findall(r"`((?:minizs|benchmarks|tests)/[\w.]+|\w+\.py)`", text):
        assert (root / path).is_file(), path
    for path, name in [
        ("grpo.py", "group_advantages"),
        ("grpo.py", "EPSILON"),
        ("grpo.py", "center"),
        ("engines.py", "class BM25"),
        ("engines.py", "class Ranking"),
        ("settings.py", "ENGINES"),
        ("settings.py", "advantage_scale:"),
        ("settings.py", "class PolicyConfig"),
        ("stages.py", "build_engine"),
        ("trajectory.py", "def searches"),
    ]:
        assert name in (root / "minizs" / path).read_text(), (path, name)


@pytest.mark.parametrize("name", ALONE)
def test_what_is_missing_is_said(name):
    """A reader who has done the exercise sees its test pass, any other where to begin: no other
    error, such as one from a function that has been renamed, is an answer."""
    try:
        TESTS[name]()
    except pytest.fail.Exception as missing:
        assert re.search(r"docs/exercises.md, exercise \d", str(missing))
