"""GRPO's advantage: a trajectory against the others that answered the same question.

Each question is sampled G times. Whatever makes a question easy or hard is common to its group, so
the group's mean reward is the baseline, and no critic is needed (arXiv 2402.03300). The advantage
of a trajectory is the same on all its tokens.

Left out: resampling of groups without spread (DAPO); `flat_groups` finds them.
"""

import torch
from torch import Tensor

EPSILON = 1e-6  # keeps the division finite; small beside any spread that F1 rewards can have


def by_group(rewards: Tensor, group_size: int) -> Tensor:
    """View `(N,)` rewards, the rows of a group adjacent, as `(N / G, G)`."""
    if rewards.dim() != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} do not split into groups of {group_size}"
        )
    return rewards.view(-1, group_size)


def center(groups: Tensor) -> Tensor:
    """Rewards minus their group's mean, `(N / G, G)`; exactly 0 in a group of equal rewards.

    The mean of three times 0.1 is not 0.1 in floating point, and dividing what is left by a tiny
    standard deviation would make an advantage of it. Measured from the group's first reward, equal
    rewards are zeros, and the mean of zeros is exact.
    """
    shifted = groups - groups[:, :1]
    return shifted - shifted.mean(dim=1, keepdim=True)


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """A_i = (r_i - mean of its group) / (s + 1e-6), `(N,)` to `(N,)`, rows of a group adjacent.

    - scale "group": s is the group's standard deviation (GRPO, arXiv 2402.03300);
    - scale "batch": s is that of all N rewards (Lite-PPO, arXiv 2508.08221): a group that hardly
      differs is not blown up. With several processes pass the rewards of all of them;
    - scale "none": no division (Dr. GRPO, arXiv 2503.20783).

    Standard deviations are those of a sample (n - 1). A group of one raises ValueError: it has no
    other trajectory to be compared with. (The paper's code takes mean 0 and deviation 1 there, so
    that A = r: plain REINFORCE under the name of GRPO.)
    """
    if group_size < 2:
        raise ValueError(
            f"GRPO compares the trajectories of a group, so group_size must be at least 2, "
            f"got {group_size}; use REINFORCE with no baseline for single trajectories"
        )
    centered = center(by_group(rewards, group_size))  # (N / G, G)
    if scale == "group":
        centered = centered / (centered.std(dim=1, keepdim=True) + EPSILON)
    elif scale == "batch":
        centered = centered / (rewards.std() + EPSILON)
    elif scale != "none":
        raise ValueError(f'scale must be "group", "batch" or "none", got "{scale}"')
    return centered.flatten()


def flat_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups have equal rewards throughout and so teach nothing, a boolean `(N / G,)`.

    Their share is worth watching: near 1 the questions are all too hard or all too easy.
    """
    groups = by_group(rewards, group_size)
    return torch.eq(groups.amax(dim=1), groups.amin(dim=1))
