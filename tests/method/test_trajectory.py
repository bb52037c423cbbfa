"""The trajectory that every part shares."""

import pytest

from minizs.trajectory import Example, Trajectory, Turn


def test_append_keeps_three_equal_lengths():
    """Ids, mask and log-probabilities grow together; the mask tells whose tokens they are."""
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
    """Sampled tokens come with as many log-probabilities, or nothing is added."""
    row = Trajectory(Example("q", ("a",)))
    with pytest.raises(ValueError, match="2 sampled tokens came with 1"):
        row.append([4, 5], [-0.5])
    assert row.ids == row.loss_mask == row.logprobs == []


def test_only_executed_searches_count():
    """A search counts if an engine replied to it, be it with nothing."""
    row = Trajectory(Example("q", ("a",)))
    row.turns = [Turn("", "search", "a", []), Turn("", "invalid", ""), Turn("", "search", "b")]
    assert row.searches == 1


def test_it_ends_with_an_answer_or_a_limit():
    """An empty answer is an answer."""
    assert not Trajectory(Example("q", ("a",))).ended
    assert Trajectory(Example("q", ("a",)), answer="").ended
    assert Trajectory(Example("q", ("a",)), truncated="turns").ended
