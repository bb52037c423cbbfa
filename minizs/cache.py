"""A key-value cache for `transformers` models whose rows each have their own length.

The library's own caches pad prompts on the left, and copy everything to append a column. Here each
row is written at its own end, in memory taken ahead, and attention reads a view of what is in use.
Left out: paged memory, sliding windows (refused beyond the window), quantised keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Cache

from minizs.batching import pad


class RowCache(Cache):
    """Keys and values of every layer, (B, H, capacity, D) each, every row with its own length."""

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.rows, self.capacity = rows, capacity
        self.stores: list[Tensor] = []  # layer 0's keys, its values, layer 1's keys, ...

    def aim(self, first: int, positions: Tensor, width: int, needed: int) -> None:
        """Next: write rows `first`... at `positions` (n, C), all below `needed`, and read their
        columns up to `width`. A capacity that is too small at least doubles: growing stays rare."""
        if needed > self.capacity:
            extra = max(needed, 2 * self.capacity) - self.capacity
            self.capacity += extra
            for i, store in enumerate(self.stores):  # one by one: never the whole cache twice
                self.stores[i] = nn.functional.pad(store, (0, 0, 0, extra))
        end = first + len(positions)
        self.window, self.width, self.positions = slice(first, end), width, positions
        self.index = torch.arange(first, end, device=positions.device)[:, None]  # (n, 1)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Attention hands in new keys and values, (n, H, C, D), and gets all, (n, H, width, D)."""
        if 2 * layer == len(self.stores):
            # Zeros, not empty memory: a masked column's weight is 0, but 0 * NaN is NaN.
            self.stores += [new.new_zeros(self.rows, new.shape[1], self.capacity, new.shape[3])
                            for new in (keys, values)]  # fmt: skip
        stores = self.stores[2 * layer : 2 * layer + 2]
        for store, new in zip(stores, (keys, values), strict=True):
            store[self.index, :, self.positions] = new.transpose(1, 2)  # (n, C, H, D)
        return tuple(store[self.window, :, : self.width] for store in stores)

    def copy(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Row targets[i] becomes what row sources[i] was, in its first `width` columns."""
        for store in self.stores:
            store[targets, :, :width] = store[sources, :, :width]


def row_limit(model: nn.Module) -> int:
    """The most tokens a row may have: the model's positions, or its sliding window if shorter (such
    a layer is an ordinary one inside it). Raises ValueError for layers that keep another state."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"not supported: layers of type {sorted(kinds)}")
    window = getattr(model.config, "sliding_window", None)
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(positions or 2**31, window or 2**31)


def feed(model: nn.Module, cache: RowCache, first: int, starts: list[int],
         chunks: list[list[int]]) -> Tensor:  # fmt: skip
    """One forward pass: `chunks[i]` follows the `starts[i]` tokens of the cache's row `first + i`.
    Returns each chunk's last hidden state, (n, d). Chunks may have different lengths: the padding
    of a short one goes behind its row's end, where the mask hides it until tokens overwrite it."""
    device, counts = model.device, [len(chunk) for chunk in chunks]
    ids = pad(chunks).to(device)  # (n, C)
    steps = torch.arange(ids.shape[1], device=device)
    positions = torch.tensor(starts, device=device)[:, None] + steps  # (n, C)
    width = max(start + count for start, count in zip(starts, counts, strict=True))
    cache.aim(first, positions, width, needed=max(starts) + len(steps))
    # A query at position p sees the keys at positions up to p: (n, 1, C, width), for every head.
    mask = (torch.arange(width, device=device) <= positions[..., None])[:, None]
    output = model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=positions,
                                 past_key_values=cache, use_cache=True)  # fmt: skip
    ends = torch.tensor(counts, device=device)
    return output.last_hidden_state[torch.arange(len(ends), device=device), ends - 1]
