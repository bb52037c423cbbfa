"""REINFORCE's advantage: the reward minus a baseline (Williams, 1992).

A baseline that does not depend on the trajectory itself leaves the gradient's mean as it is and
takes away variance. Without one (the paper's code), rewards between 0 and 1 only ever push
probabilities up. Left out: whitening over the batch (REINFORCE++, arXiv 2501.03262)."""

from torch import Tensor

from minizs.grpo import center


def advantages(rewards: Tensor, group_size: int, baseline: str = "leave_one_out") -> Tensor:
    """`(N,)` rewards, the G >= 2 rows of a group adjacent, to `(N,)` advantages, exactly 0 where a
    group's rewards are equal:

    - "leave_one_out" (RLOO, arXiv 2402.14740): A_i = r_i - the mean of the G - 1 others,
      which is G / (G - 1) * (r_i - the mean of all G);
    - "mean": A_i = r_i - the mean of all G; slightly biased towards 0, as r_i is in the mean;
    - "none": A_i = r_i, for G >= 1."""
    if baseline == "none":
        return rewards
    if baseline not in ("leave_one_out", "mean"):
        raise ValueError(f'baseline must be "leave_one_out", "mean" or "none", got "{baseline}"')
    centered = center(rewards, group_size).flatten()  # (N,)
    return centered if baseline == "mean" else centered * group_size / (group_size - 1)
