"""Group-relative advantages."""

import statistics

import pytest
import torch

from minizs.grpo import flat_groups, group_advantages


def test_by_hand():
    """Rewards 1, 0, 0, 1: mean 1/2, sample deviation sqrt(4 * 1/4 / 3) = 0.57735."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    expected = torch.tensor([0.8660, -0.8660, -0.8660, 0.8660])
    assert torch.allclose(group_advantages(rewards, 4), expected, atol=1e-4)
    assert group_advantages(rewards, 4, "none").tolist() == [0.5, -0.5, -0.5, 0.5]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_against_second_computation(scale):
    """The standard deviation has n - 1, over the group or the whole batch, as the scale says."""
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0))
    expected = []
    for start in range(0, 12, 3):
        group = rewards[start : start + 3].tolist()
        spread = {
            "group": statistics.stdev(group) + 1e-6,
            "batch": statistics.stdev(rewards.tolist()) + 1e-6,
            "none": 1.0,
        }[scale]
        expected += [(reward - statistics.fmean(group)) / spread for reward in group]
    got = group_advantages(rewards, 3, scale)
    assert torch.allclose(got, torch.tensor(expected), atol=1e-5)
    assert torch.allclose(got.view(4, 3).sum(dim=1), torch.zeros(4), atol=1e-5)


def test_groups_do_not_mix():
    """Ungrouped rows are silently REINFORCE, mixed ones compare different questions."""
    rewards = torch.tensor([0.1, 0.4, 0.3, 0.9, 0.2, 0.2])
    changed = rewards.clone()
    changed[3:] = torch.tensor([0.0, 1.0, 0.5])
    first, second = group_advantages(rewards, 3), group_advantages(changed, 3)
    assert torch.equal(first[:3], second[:3])
    assert not torch.equal(first[3:], second[3:])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_equal_rewards_are_exactly_zero(scale, size):
    """The float mean of three times 0.1 is not 0.1: over a tiny deviation that is an advantage."""
    rewards = torch.tensor([0.1, 0.7, 1 / 3, 0.123456]).repeat_interleave(size)
    assert torch.equal(group_advantages(rewards, size, scale), torch.zeros(4 * size))
    assert flat_groups(rewards, size).all()


def test_flat_groups_are_found():
    """The share of groups that teach nothing is a figure to watch."""
    rewards = torch.tensor([0.0, 0.0, 0.0, 0.2, 1.0, 1.0])
    assert flat_groups(rewards, 2).tolist() == [True, False, True]


def test_wrong_groups_are_refused():
    """A group of one becomes A = r in the paper's code, without a word."""
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.rand(4), 1)
    with pytest.raises(ValueError, match="groups of 3"):
        group_advantages(torch.rand(4), 3)
    with pytest.raises(ValueError, match="scale"):
        group_advantages(torch.rand(4), 2, "std")
