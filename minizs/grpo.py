"""GRPO's advantage: a trajectory against the others that answered the same question.

What makes a question easy or hard is common to its G samples: their mean reward is the baseline, no
critic is needed (arXiv 2402.03300), and all tokens of a sample share its advantage.
Left out: resampling of groups without spread (DAPO); `flat_groups` finds them."""

from torch import Tensor

EPSILON = 1e-6  # keeps the division finite; small beside any spread that F1 rewards can have


def center(rewards: Tensor, group_size: int) -> Tensor:
    """`(N,)` rewards, the rows of a group adjacent, minus their group's mean: `(N / G, G)`; exactly
    0 in a group of equal rewards."""
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"{len(rewards)} rewards do not split into groups of {group_size}, or of "
            "at least 2; for 1, use REINFORCE with no baseline"
        )
    # The float mean of three times 0.1 is not 0.1, and a tiny deviation would make an advantage of
    # the rest. Minus the group's first, equal rewards are zeros.
    groups = rewards.view(-1, group_size)
    shifted = groups - groups[:, :1]
    return shifted - shifted.mean(dim=1, keepdim=True)


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """A_i = (r_i - mean of its group) / (s + 1e-6), `(N,)` to `(N,)`, rows of a group adjacent.
    Groups of one raise ValueError: the paper's code has A = r there, REINFORCE by another name.
    Standard deviations s are those of a sample (n - 1):

    - scale "group": s is the group's standard deviation (GRPO, arXiv 2402.03300);
    - scale "batch": s is that of all N rewards, those of all processes (Lite-PPO, arXiv
      2508.08221): a group that hardly differs is not blown up;
    - scale "none": no division (Dr. GRPO, arXiv 2503.20783)."""
    centered = center(rewards, group_size)  # (N / G, G)
    if scale == "group":
        centered = centered / (centered.std(dim=1, keepdim=True) + EPSILON)
    elif scale == "batch":
        centered = centered / (rewards.std() + EPSILON)
    elif scale != "none":
        raise ValueError(f'scale must be "group", "batch" or "none", got "{scale}"')
    return centered.flatten()


def flat_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups have equal rewards throughout and so teach nothing, a boolean `(N / G,)`."""
    low, high = rewards.view(-1, group_size).aminmax(dim=1)
    return low == high
