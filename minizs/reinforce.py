"""REINFORCE's advantage: the reward minus a baseline (Williams, 1992).

A baseline that does not depend on the trajectory itself leaves the gradient's mean as it is and
takes away variance. Without one, rewards between 0 and 1 only ever push probabilities up: that is
what the paper's code does, and its authors recommend; here it is `baseline="none"`.
Left out: whitening over the batch (REINFORCE++, arXiv 2501.03262).
"""

from torch import Tensor

from minizs.grpo import by_group, center


def advantages(rewards: Tensor, group_size: int, baseline: str = "leave_one_out") -> Tensor:
    """`(N,)` rewards, the G rows of a group adjacent, to `(N,)` advantages in units of reward;
    exactly 0 where a group's are equal. Baselines need G >= 2.

    - "leave_one_out" (RLOO, arXiv 2402.14740): A_i = r_i - the mean of the G - 1 others,
      which is G / (G - 1) * (r_i - the mean of all G);
    - "mean": A_i = r_i - the mean of all G; slightly biased towards 0, as r_i is in the mean;
    - "none": A_i = r_i.
    """
    groups = by_group(rewards, group_size)  # (N / G, G)
    if baseline == "none":
        return rewards
    if baseline == "mean":
        return center(groups).flatten()
    if baseline == "leave_one_out":
        return (center(groups) * group_size / (group_size - 1)).flatten()
    raise ValueError(f'baseline must be "leave_one_out", "mean" or "none", got "{baseline}"')
