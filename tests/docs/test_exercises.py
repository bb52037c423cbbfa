"""docs/exercises.md and its tests agree, and an exercise that is not done says so in a sentence."""

import inspect
import re
from pathlib import Path

import exercises
import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "exercises.md"
TO_BE_WRITTEN = "minizs/engines/overlap.py"  # by the reader
TESTS = {name: test for name, test in vars(exercises).items() if name.startswith("test_")}
ALONE = [name for name, test in TESTS.items() if not inspect.signature(test).parameters]


def test_every_exercise_has_tests_and_every_test_an_exercise():
    """Each `-k` word of the page selects tests, and each test is selected by one of them."""
    words = re.findall(r"^## \d.*\(`-k (\w+)`\)", PAGE.read_text(), flags=re.MULTILINE)
    assert len(words) == 5
    for name in TESTS:
        assert sum(word in name for word in words) == 1, name
    for word in words:
        assert sum(word in name for name in TESTS) >= 2, word


def test_the_files_to_change_are_there():
    """The page sends its reader to files and names that exist."""
    text = PAGE.read_text()
    for path in re.findall(r"`((?:minizs|benchmarks|tests)/[\w./]+|\w+\.py)`", text):
        assert (ROOT / path).is_file() or path == TO_BE_WRITTEN, path
    for path, name in [
        ("minizs/grpo.py", "def group_advantages"),
        ("minizs/grpo.py", "EPSILON"),
        ("minizs/grpo.py", "def center"),
        ("minizs/engines/bm25.py", "class BM25"),
        ("minizs/engines/bm25.py", "WORDS"),
        ("minizs/engines/corpus.py", "def load_corpus"),
        ("minizs/engines/ranking.py", "class Ranking"),
        ("minizs/runs/settings.py", "REAL_ENGINES"),
        ("minizs/runs/settings.py", "advantage_scale:"),
        ("minizs/runs/settings.py", "class AlgorithmSettings"),
        ("minizs/runs/settings.py", "class TrainingSettings"),
        ("minizs/runs/settings.py", "class CurriculumSettings"),
        ("minizs/runs/settings.py", "def check_groups"),
        ("minizs/runs/settings.py", "def check_engine"),
        ("minizs/runs/build.py", "def build_engine"),
        ("minizs/runs/build.py", "def build_bm25"),
        ("minizs/trajectory.py", "def searches"),
        ("train_policy.py", "def noise_at"),
        ("tests/world/test_tiny_base.py", "def test_the_texts_of_a_seed_stay_the_same"),
    ]:
        assert name in (ROOT / path).read_text(), (path, name)


@pytest.mark.parametrize("name", ALONE)
def test_what_is_missing_is_said(name):
    """A test passes, for a reader who has done the exercise, or fails with where to begin.

    Any other error, such as one from a function that has been renamed, would be a fault of ours."""
    try:
        TESTS[name]()
    except pytest.fail.Exception as missing:
        assert re.search(r"docs/exercises.md, exercise \d", str(missing))
