"""What a run that dies is told, and when."""

import re

import pytest
from scripts import ROOT, metrics, policy

from minizs.runs.alarms import ALARMS, WINDOW, Alarm, Alarms
from minizs.runs.metrics import LIMITS

WELL = {
    "step": 100,
    "reward": 0.6,
    "kl": 0.1,
    "entropy": 0.4,
    "valid_rate": 1.0,
    "searches_per_question": 1.5,
    "truncated": 0.02,
    "answered": 0.98,
    "thinking_characters": 200.0,
}


def sentences(rows: list[dict]) -> list[str]:
    """All that the alarms of a run with these lines of metrics say."""
    alarms = Alarms([])
    return [sentence for row in rows for sentence in alarms.check(row)]


@pytest.mark.parametrize(
    "metric, value, name",
    [
        ("reward", 0.1, "reward collapse"),
        ("kl", 3.0, "KL runaway"),
        ("entropy", 2.0, "entropy runaway"),
        ("valid_rate", 0.0, "no valid actions"),
        ("searches_per_question", 0.0, "no searches"),
        ("truncated", 0.9, "responses at the limit"),
        ("answered", 0.4, "answer avoidance"),
        ("thinking_characters", 10.0, "thinking collapse"),
    ],
)
def test_alarms(metric, value, name):
    """A metric that went wrong over a window of steps sounds its alarm once; one bad batch none."""
    well, ill = [WELL] * (2 * WINDOW), [WELL | {metric: value}] * WINDOW
    for rows in (well, ill, [], well + ill[:1] + well[:5]):
        assert sentences(rows) == []
    [sentence] = sentences(well + ill + ill)
    assert sentence.startswith(f"{name}: {metric} is {value:.3g}") or metric in sentence
    assert sentence.startswith(name)
    missing = sentences([*well, *ill[:-1], WELL | {metric: None}])  # null in a log
    assert all(sentence.startswith(name) for sentence in missing)


@pytest.mark.parametrize("metric, value", [("answered", 0.4), ("thinking_characters", 10.0)])
def test_two_sicknesses_are_those_that_the_reward_hides(metric, value):
    """Where the reward has collapsed, too, the alarm about the reward says enough."""
    rows = [WELL] * (2 * WINDOW) + [WELL | {metric: value, "reward": 0.1}] * WINDOW
    [sentence] = sentences(rows)
    assert sentence.startswith("reward collapse")


DEAD = {"reward": 0.0, "flat_groups": 1.0, "searches_per_question": 1.0, "valid_rate": 1.0}


@pytest.mark.parametrize(
    "figures, words",
    [
        (
            {"truncated_turn_tokens": 1.0, "valid_rate": 0.0},
            "100% of the trajectories in the first 5 steps end without an answer at "
            "--max_turn_tokens: raise it.",
        ),
        ({"truncated_context": 0.97, "valid_rate": 0.5}, "97% .* at --max_context: raise it."),
        ({"truncated_turns": 1.0}, "at --max_turns: raise it."),
        ({"truncated_turns": 1.0, "valid_rate": 0.0}, "0% of the turns .* hold a valid action"),
        ({"searches_per_question": 0.0}, "0.00 searches a question"),
        ({"empty_replies": 1.0}, "100% of the replies .* hold no document: check what --engine"),
        (
            {"reward": 0.5},
            "In 100% of the groups .* all rewards are equal .*--group_size or --temperature",
        ),
        ({"answered": 1.0}, "Every reward .* is 0.*100% of the trajectories .* each is wrong"),
        ({"answered": 1.0, "flat_groups": None}, "Every reward .* is 0"),  # PPO has no such groups
        (
            {"answered": 0.7, "truncated_context": 0.3},
            "Every reward .* is 0.*; 30% end without one at --max_context: raise it.",
        ),
        (
            {"truncated_turn_tokens": 0.4, "truncated_context": 0.6, "valid_rate": 0.5},
            "60% .* at --max_context: raise it.$",
        ),
        ({"truncated_turn_tokens": 1.0, "valid_rate": 0.0}, "If it still .*--warm_start scripted"),
    ],
)
def test_a_run_that_cannot_learn_is_told_so_after_five_steps(figures, words):
    """One sentence with the share and the flag to change, the cause before what it causes."""
    rows = [DEAD | figures | {"step": step} for step in range(1, 12)]
    assert sentences(rows[:4]) == []
    [sentence] = sentences(rows)
    assert re.search(words, sentence)
    assert "\n" not in sentence


def test_the_page_that_alarms_name_has_their_symptoms():
    """docs/running.md has a section for what the alarms point to."""
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    section = page.split("## It does not learn")[1].split("\n## ")[0]
    for alarm in ALARMS:
        assert f"`{alarm.metric}`" in section, alarm.name
    for flag in LIMITS.values():
        assert f"--{flag}" in section


def test_the_limit_that_is_in_the_way_is_named():
    """Of the three limits, the alarm names the one that ends the most trajectories."""
    well = [WELL] * (2 * WINDOW)
    ill = [WELL | {"truncated": 0.9, "truncated_turn_tokens": 0.2, "truncated_context": 0.7}]
    [sentence] = sentences(well + ill * WINDOW)
    assert "raise --max_context or lower --lr" in sentence


def test_a_run_that_can_learn_is_told_nothing():
    """Rare rewards are no illness, and without an engine no replies are expected."""
    rows = [DEAD | {"step": step, "flat_groups": 0.9, "reward": 0.01} for step in range(1, 6)]
    assert sentences(rows) == []
    alarms = Alarms([], replies_expected=False)
    rows = [row | {"empty_replies": 1.0} for row in rows]
    assert [sentence for row in rows for sentence in alarms.check(row)] == []


def test_a_dead_run_says_so(work, capsys):
    """From end to end: turns that are too short for an answer."""
    policy("--steps", "6", "--max_turn_tokens", "2", "--output", "run")
    assert "Step 5: 100% of the trajectories" in capsys.readouterr().out
    assert [row["truncated_turn_tokens"] for row in metrics(work / "run")] == [1.0] * 6


def test_an_alarm_sounds_once(work, monkeypatch, capsys):
    """A run's log has one sentence for each alarm, however long its cause lasts."""
    monkeypatch.setattr("minizs.runs.alarms.WINDOW", 1)
    monkeypatch.setattr(
        "minizs.runs.alarms.ALARMS", [Alarm("x", "reward", lambda *_: True, "Ring")]
    )
    policy("--steps", "3", "--output", "run")
    assert capsys.readouterr().out.count("Ring") == 1
