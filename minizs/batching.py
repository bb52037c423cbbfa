"""From lists of token ids to padded tensors: micro-batches by token budget, sorted by length.

Sorting by length leaves little padding, and a budget in positions rather than rows bounds memory
whatever the lengths. Nothing is ever inferred from a pad id: lengths make the masks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def by_budget(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of rows in groups of similar length, of at most `budget` positions with padding.

    A row that is longer than the budget makes a group of its own.
    """
    groups: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the longest first
        if not groups or (len(groups[-1]) + 1) * width > budget:
            groups.append([])
            width = lengths[i]
        groups[-1].append(i)
    return groups


def pad(rows: Sequence[list], dtype: torch.dtype = torch.long) -> Tensor:
    """Lists of numbers to (B, T), zeros on the right up to the longest row."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=dtype)


def attention(lengths: list[int]) -> Tensor:
    """(B, T) ones on each row's first `length` positions."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
