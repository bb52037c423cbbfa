"""The trajectory that every part shares."""

import pytest

from minizs.trajectory import Example, Trajectory, Turn


def test_append_keeps_three_equal_lengths():
    """Guards a mask or log-probabilities that drift from the ids (TRL#5144)."""
    row = Trajectory(Example("q", ("a",)))
    prompt = [1, 2, 3]
    row.append(prompt)
    row.append([4, 5], [-0.5, -1.5])
    row.append([6])
    assert row.ids == [1, 2, 3, 4, 5, 6]
    assert row.loss_mask == [0, 0, 0, 1, 1, 0]
    assert row.logprobs == [0.0, 0.0, 0.0, -0.5, -1.5, 0.0]
    assert prompt == [1, 2, 3]  # the caller's list, which a whole group shares, is left alone


def test_a_token_without_its_logprob_is_refused():
    """Guards silently shifted log-probabilities; nothing may have been added when it is noticed."""
    row = Trajectory(Example("q", ("a",)))
    with pytest.raises(ValueError, match="2 sampled tokens came with 1"):
        row.append([4, 5], [-0.5])
    assert row.ids == row.loss_mask == row.logprobs == []


def test_only_executed_searches_count():
    """Guards counting queries that nobody answered; an empty reply is an answer."""
    row = Trajectory(Example("q", ("a",)))
    row.turns = [Turn("", "search", "a", []), Turn("", "invalid", ""), Turn("", "search", "b")]
    assert row.searches == 1
