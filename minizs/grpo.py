"""GRPO's advantage: a trajectory is compared with the others that answered the same question.

What makes a question easy or hard is common to the G trajectories of its group. So the mean reward
of the group is the baseline, no critic is needed (arXiv 2402.03300), and all tokens of a trajectory
share its advantage.

Left out: sampling again where a group has no spread (DAPO). `flat_groups` finds these groups.
"""

from torch import Tensor

EPSILON = 1e-6  # keeps the division finite; small beside any spread that F1 rewards can have


def center(rewards: Tensor, group_size: int) -> Tensor:
    """The rewards minus the mean of their group: (N,) to (N / G, G).

    The rows of a group are adjacent. In a group of equal rewards the result is exactly 0.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"{len(rewards)} rewards do not split into groups of {group_size}, or of "
            "at least 2; for 1, use REINFORCE with no baseline"
        )
    # The float mean of three times 0.1 is not 0.1. Divided by a tiny standard deviation, that
    # difference would become an advantage. Minus the group's first, equal rewards are zeros.
    groups = rewards.view(-1, group_size)  # (N / G, G)
    shifted = groups - groups[:, :1]
    return shifted - shifted.mean(dim=1, keepdim=True)


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """A_i = (r_i - mean of its group) / (s + 1e-6): (N,) to (N,), rows of a group adjacent.

    The scale decides the standard deviation s, which is that of a sample (n - 1):

    - "group": s is the group's standard deviation (GRPO, arXiv 2402.03300).
    - "batch": s is that of all N rewards (Lite-PPO, arXiv 2508.08221), so that a group that hardly
      differs is not blown up. With several processes, N has to hold the rewards of all.
    - "none": no division (Dr. GRPO, arXiv 2503.20783).

    Groups of one raise ValueError. The paper's code gives them A = r, which is REINFORCE.
    """
    centered = center(rewards, group_size)  # (N / G, G)
    if scale == "group":
        centered = centered / (centered.std(dim=1, keepdim=True) + EPSILON)
    elif scale == "batch":
        centered = centered / (rewards.std() + EPSILON)
    elif scale != "none":
        raise ValueError(f'scale must be "group", "batch" or "none", got "{scale}"')
    return centered.flatten()


def flat_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups have equal rewards throughout, and so teach nothing: (N,) to bool (N / G,)."""
    low, high = rewards.view(-1, group_size).aminmax(dim=1)
    return low == high
