"""The tests of docs/exercises.md: each fails until its exercise is done.

They are not part of the suite, since pytest collects no file of this name by itself. Run one with

    python -m pytest tests/exercises.py -k advantage
"""

import importlib
import json
import math

import pytest
import torch
from scripts import metrics, policy
from transformers import AutoTokenizer

import evaluate
from minizs import UserError, grpo, reward
from minizs.runs.flags import parse
from minizs.runs.settings import ENGINES, PolicyConfig
from minizs.trajectory import SearchRequest
from minizs.world import facts


def written(module: str, name: str, exercise: int):
    """What the reader has written, or a failure that says what is missing and where."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError):
        pytest.fail(
            f"{module} has no {name} yet: docs/exercises.md, exercise {exercise}.", pytrace=False
        )


def parse_or_fail(exercise: int, *flags: str) -> PolicyConfig:
    """The settings of train_policy.py with these flags, or a failure that says what it refused."""
    try:
        return parse(PolicyConfig, list(flags))
    except UserError as error:
        pytest.fail(f"{error} (docs/exercises.md, exercise {exercise}.)", pytrace=False)


# ---- 1: another advantage ---------------------------------------------------------------------


def range_scaled(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    try:
        return grpo.group_advantages(rewards, group_size, "range")
    except ValueError as error:
        pytest.fail(f"{error} (docs/exercises.md, exercise 1.)")


def test_advantage_by_hand():
    """Mean 0.5, range 1; and mean 0.25, range 0.5, in a group of its own."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.5, 0.0, 0.5, 0.0])
    expected = torch.tensor([0.5, -0.5, 0.0, 0.0, 0.5, -0.5, 0.5, -0.5])
    assert torch.allclose(range_scaled(rewards, 4), expected, atol=1e-4)


def test_advantage_of_a_flat_group_is_exactly_zero():
    """A range of 0 must neither divide nor blow up what rounding leaves."""
    assert torch.equal(range_scaled(torch.full((6,), 0.1), 3), torch.zeros(6))


def test_advantage_can_be_chosen():
    """A function that no run can use is half of the work."""
    assert parse_or_fail(1, "--advantage_scale", "range").advantage_scale == "range"


# ---- 2: another engine ------------------------------------------------------------------------

DOCUMENTS = ["the cat sat", "a cat sat on the red mat", "red dogs", "nothing of it"]


def test_engine_ranks_by_shared_words():
    """Best first, at most top_k, one list for each request, in the requests' order."""
    engine = written("minizs.engines.overlap", "Overlap", 2)(DOCUMENTS, top_k=2)
    first, second = engine.search([SearchRequest("red mat cat"), SearchRequest("red dogs")])
    assert len(first) == 2 and first[0] == DOCUMENTS[1]
    assert second == [DOCUMENTS[2], DOCUMENTS[1]]
    assert engine.search([]) == []


def test_engine_can_be_noisy():
    """A noisy reply lacks what the request needs, and is filled up from further down."""
    engine = written("minizs.engines.overlap", "Overlap", 2)(DOCUMENTS, top_k=2)
    request = SearchRequest("red mat cat", answers=("mat",), noisy=True)
    [documents] = engine.search([request])
    assert len(documents) == 2 and DOCUMENTS[1] not in documents


def test_engine_can_be_chosen(tmp_path):
    """From the command line, with the tiny world."""
    if "overlap" not in ENGINES:
        pytest.fail("--engine overlap is unknown yet: docs/exercises.md, exercise 2.")
    path = tmp_path / "figures.json"
    flags = "--policy tiny --before none --engine overlap --questions 4 --temperature 1".split()
    evaluate.main([*flags, "--threads", "1", "--output", str(path)])
    assert json.loads(path.read_text())["overall"]["n"] == 4


# ---- 3: a reward with a search cost -------------------------------------------------------------


def test_cost_by_hand():
    """Half a point is left of 0.7 after two searches at 0.1; nothing is ever below zero."""
    with_cost = written("minizs.reward", "with_search_cost", 3)
    assert with_cost(0.7, 2, 0.1) == pytest.approx(0.5)
    assert with_cost(0.7, 0, 0.1) == 0.7
    assert with_cost(0.1, 5, 0.1) == with_cost(0.0, 3, 0.1) == 0.0


def test_cost_is_what_a_run_learns_from(work):
    """The logged reward is the F1 less what the executed searches cost."""
    parse_or_fail(3, "--search_cost", "0.25")
    policy("--search_cost", "0.25", "--output", "run")
    rows = [json.loads(line) for line in (work / "run" / "trajectories.jsonl").open()]
    for row in rows:
        searches = sum(turn["documents"] is not None for turn in row["turns"])
        f1 = reward.f1_score(row["answer"], row["example"]["answers"])
        assert row["reward"] == pytest.approx(max(0.0, f1 - 0.25 * searches))
    assert any(turn["documents"] for row in rows for turn in row["turns"])


# ---- 4: another noise schedule ------------------------------------------------------------------


def test_noise_by_hand():
    """Half a cosine: flat at both ends, half of the way at half time."""
    noise = written("minizs.curriculum", "cosine_noise", 4)
    assert noise(0, 8, 0.1, 0.5) == pytest.approx(0.1)
    assert noise(2, 8, 0.0, 1.0) == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert noise(4, 8, 0.1, 0.5) == pytest.approx(0.3)
    assert noise(8, 8, 0.1, 0.5) == noise(9, 8, 0.1, 0.5) == pytest.approx(0.5)


def test_noise_of_a_run(work):
    """The simulator of each step is as noisy as the schedule says."""
    parse_or_fail(4, "--noise_shape", "cosine")
    policy(
        "--noise_shape",
        "cosine",
        "--noise_start",
        "0.2",
        "--noise_end",
        "0.8",
        "--engine",
        "simulator",
        "--simulator",
        "../base",
        "--output",
        "run",
    )
    noise = [row["noise"] for row in metrics(work / "run")]
    assert noise == pytest.approx([0.5, 0.8])


# ---- 5: another world ---------------------------------------------------------------------------


def new_question() -> str:
    """The wording of the new question, with {s} where the company goes."""
    texts = [text for *path, text in facts.TWO_HOP if path == ["founded_by", "works_for"]]
    if not texts:
        pytest.fail(
            "language.yaml never asks where a founder works: docs/exercises.md, exercise 5.",
            pytrace=False,
        )
    return texts[0]


def test_world_has_the_new_questions():
    """The answer is where the founder works: two look-ups in the facts."""
    text = new_question()
    world = facts.World(7)
    companies = {text.format(s=company): company for company in world.members["company"]}
    questions = [question for question in world.questions() if question.text in companies]
    assert questions and len(world.questions()) > len(questions)
    for question in questions:
        company = companies[question.text]
        founder = world.facts[company, "founded_by"]
        assert question.path == ((company, "founded_by"), (founder, "works_for"))
        assert question.answer == world.facts[founder, "works_for"]


def test_world_is_spoken_by_the_base_model():
    """With a word that it has never seen, nothing could be learned from the question."""
    text = new_question()
    tokenizer = AutoTokenizer.from_pretrained("minizs/world/tiny_base")
    ids = tokenizer(text.format(s=facts.World(7).members["company"][0]))["input_ids"]
    assert tokenizer.unk_token_id not in ids
