"""From lists of token ids to padded tensors. Lengths make the masks, never a pad id."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minizs.trajectory import Trajectory


def by_budget(lengths: list[int], budget: int) -> list[list[int]]:
    """Split rows of these lengths into groups of similar length; returns the rows' indices.

    A group has at most `budget` positions, padding included, or is a single row. The longest rows
    come first, so that a batch which does not fit into memory fails at once.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    for row in longest_first:
        if groups:
            width = lengths[groups[-1][0]]  # a group is as wide as its first row
            fits = (len(groups[-1]) + 1) * width <= budget
        if not groups or not fits:
            groups.append([])
        groups[-1].append(row)
    return groups


def pad(rows: list[list] | tuple[list, ...], dtype: torch.dtype = torch.long) -> Tensor:
    """Lists of numbers to (B, T), with zeros on the right up to the longest row."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=dtype)


def attention(lengths: list[int]) -> Tensor:
    """(B, T), 1 on the first `length` positions of each row and 0 after them."""
    positions = torch.arange(max(lengths))  # (T,)
    return (positions < torch.tensor(lengths)[:, None]).long()


@dataclass
class Batch:
    """Trajectories as tensors, padded on the right: what one forward pass takes. All are (B, T)."""

    rows: list[int]  # the places of these trajectories among all that were given
    ids: Tensor
    attention: Tensor  # 1 on tokens, 0 on padding
    mask: Tensor  # 1 on the policy's own tokens
    sampled_logprobs: Tensor  # from the rollout
    # What an update adds. The log-probabilities and values are those of before its first step.
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


def make_batch(
    trajectories: list[Trajectory], rows: list[int], device: torch.device | str = "cpu"
) -> Batch:
    """The batch of these rows."""
    chosen = [trajectories[row] for row in rows]
    lengths = [len(trajectory.ids) for trajectory in chosen]
    sampled_logprobs = pad([trajectory.logprobs for trajectory in chosen], dtype=torch.float32)
    return Batch(
        rows,
        ids=pad([trajectory.ids for trajectory in chosen]).to(device),
        attention=attention(lengths).to(device),
        mask=pad([trajectory.loss_mask for trajectory in chosen]).to(device),
        sampled_logprobs=sampled_logprobs.to(device),
    )
