"""From lists of token ids to padded tensors. Lengths make the masks, never a pad id."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minizs.trajectory import Trajectory


def by_budget(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of rows in groups of similar length: up to `budget` positions, padded, or one row."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the longest first
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def pad(rows: list[list] | tuple[list, ...], dtype: torch.dtype = torch.long) -> Tensor:
    """Lists of numbers to (B, T), zeros on the right up to the longest row."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=dtype)


def attention(lengths: list[int]) -> Tensor:
    """(B, T) ones on each row's first `length` positions."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@dataclass
class Batch:
    """Trajectories as (B, T) tensors, padded on the right."""

    rows: list[int]  # which trajectories these are
    ids: Tensor
    attention: Tensor
    mask: Tensor  # 1 on the policy's own tokens
    sampled_logprobs: Tensor  # as the rollout computed them
    old_logprobs: Tensor | None = None  # as the scorer computes them before the first update
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


def collate(
    trajectories: list[Trajectory], rows: list[int], device: torch.device | str = "cpu"
) -> Batch:
    chosen = [trajectories[i] for i in rows]
    logprobs = pad([t.logprobs for t in chosen], dtype=torch.float32)
    tensors = (
        pad([t.ids for t in chosen]),
        attention([len(t.ids) for t in chosen]),
        pad([t.loss_mask for t in chosen]),
        logprobs,
    )
    return Batch(rows, *(tensor.to(device) for tensor in tensors))
