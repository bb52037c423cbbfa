"""REINFORCE's advantages."""

import pytest
import torch

from minizs.reinforce import advantages


def test_by_hand():
    """Rewards 1, 0, 0.5: the others' means are 0.25, 0.75, 0.5."""
    rewards = torch.tensor([1.0, 0.0, 0.5])
    assert advantages(rewards, 3).tolist() == [0.75, -0.75, 0.0]
    assert advantages(rewards, 3, "mean").tolist() == [0.5, -0.5, 0.0]
    assert advantages(rewards, 3, "none").tolist() == [1.0, 0.0, 0.5]


def test_leave_one_out_against_loops():
    """A_i is the reward minus the mean of the others in its group, computed one by one."""
    rewards = torch.rand(20, generator=torch.Generator().manual_seed(1))
    expected = []
    for i in range(20):
        start = i // 5 * 5
        others = [rewards[j].item() for j in range(start, start + 5) if j != i]
        expected.append(rewards[i].item() - sum(others) / 4)
    assert torch.allclose(advantages(rewards, 5), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
def test_equal_rewards_are_exactly_zero(baseline):
    """What rounding leaves of a flat group must not train."""
    assert torch.equal(advantages(torch.full((6,), 0.1), 3, baseline), torch.zeros(6))


def test_single_trajectories_have_no_baseline():
    """Leaving one out of one divides by zero."""
    assert advantages(torch.tensor([0.3, 0.7]), 1, "none").tolist() == pytest.approx([0.3, 0.7])
    for baseline in ("leave_one_out", "mean"):
        with pytest.raises(ValueError, match="at least 2"):
            advantages(torch.rand(2), 1, baseline)
    with pytest.raises(ValueError, match="baseline must be"):
        advantages(torch.rand(2), 2, "median")
