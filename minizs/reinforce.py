"""REINFORCE's advantage: the reward minus a baseline (Williams, 1992).

A baseline that does not depend on the trajectory itself leaves the mean of the gradient as it is
and takes away variance. Without a baseline, as in the paper's code, rewards between 0 and 1 only
ever push probabilities up.

Left out: whitening over the batch (REINFORCE++, arXiv 2501.03262).
"""

from torch import Tensor

from minizs.grpo import center


def advantages(rewards: Tensor, group_size: int, baseline: str = "leave_one_out") -> Tensor:
    """The reward minus the baseline: (N,) to (N,), the G rows of a group adjacent.

    - "leave_one_out" (RLOO, arXiv 2402.14740): A_i = r_i - the mean of the G - 1 others, which
      equals G / (G - 1) * (r_i - the mean of all G).
    - "mean": A_i = r_i - the mean of all G. It is slightly biased towards 0, because r_i is in it.
    - "none": A_i = r_i.

    The first two need G >= 2 and are exactly 0 where the rewards of a group are equal.
    """
    if baseline == "none":
        return rewards
    if baseline not in ("leave_one_out", "mean"):
        raise ValueError(f'baseline must be "leave_one_out", "mean" or "none", got "{baseline}"')
    centered = center(rewards, group_size).flatten()  # (N,)
    if baseline == "mean":
        return centered
    return centered * group_size / (group_size - 1)
