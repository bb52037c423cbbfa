"""Micro-batches by a budget of positions, and padding."""

import random

import pytest
import torch

from minizs.models.batches import attention, by_budget, pad


@pytest.mark.parametrize("budget", [1, 30, 100, 10_000])
def test_groups_are_within_the_budget_and_cover_all(budget):
    """A group has at most the budget's positions, or is one row; each row is in one group."""
    rng = random.Random(0)
    lengths = [rng.randint(1, 60) for _ in range(40)]
    groups = by_budget(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(40))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    assert (budget < 10_000) == (len(groups) > 1)


def test_groups_hold_similar_lengths():
    """Rows are grouped by length, so that little of a batch is padding."""
    assert by_budget([10, 2, 9, 3], 20) == [[0, 2], [3, 1]]
    assert by_budget([5, 5, 5], 10) == [[0, 1], [2]]
    assert by_budget([], 10) == []


def test_pad_and_attention():
    """Masks come from lengths: a row may end with the pad id."""
    rows = [[7, 0], [5, 6, 0], [9]]
    assert pad(rows).tolist() == [[7, 0, 0], [5, 6, 0], [9, 0, 0]]
    assert attention([2, 3, 1]).tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert pad([[0.5]], dtype=torch.float32).dtype == torch.float32
