"""From lists of token ids to padded tensors: micro-batches by token budget, sorted by length.

Sorting by length leaves little padding, and a budget in positions rather than rows bounds memory
whatever the lengths. Nothing is ever inferred from a pad id: lengths make the masks.
"""

import torch
from torch import Tensor


def by_budget(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of rows in groups of similar length, of at most `budget` positions with padding.

    A row that is longer than the budget makes a group of its own.
    """
    groups: list[list[int]] = []
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    width = 0
    for i in longest_first:
        if not groups or (len(groups[-1]) + 1) * width > budget:
            groups.append([])
            width = lengths[i]
        groups[-1].append(i)
    return groups


def pad(rows: list[list], width: int | None = None, dtype: torch.dtype = torch.long) -> Tensor:
    """Lists of numbers to (B, T), zeros on the right up to `width` or the longest row."""
    width = width or max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=dtype)


def attention(lengths: list[int], width: int | None = None) -> Tensor:
    """(B, T) ones on each row's first `length` positions."""
    width = width or max(lengths)
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
