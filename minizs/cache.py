"""A key-value cache whose rows each have their own length, written at their ends in memory taken
ahead. (The `transformers` ones pad on the left, and copy everything to append a column.)
Left out: paged memory, sliding windows (refused beyond them), quantised keys."""

import inspect
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from transformers import Cache

from minizs.models.batches import pad
from minizs.models.composite import text_config


def row_limit(model: nn.Module) -> int:
    """The most tokens a row may have: the model's positions, or its sliding window if shorter (such
    a layer is an ordinary one inside it). Raises ValueError for layers that keep another state."""
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"not supported: layers of type {sorted(kinds)}")
    names = "max_position_embeddings", "sliding_window"
    return min(getattr(config, name, None) or 2**31 for name in names)


@cache
def cache_argument(decoder: type[nn.Module]) -> str:
    """The name under which a decoder takes its cache: `transformers` renamed it in 5.24."""
    names = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class RowCache(Cache):
    """Keys and values of every layer, (B, H, capacity, D) each, every row with its own length."""

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.rows, self.capacity = rows, capacity
        self.stores: list[Tensor] = []  # layer 0's keys, its values, layer 1's keys, ...

    def feed(self, model: nn.Module, first: int, parts: list[tuple[int, list[int]]]) -> Tensor:
        """One forward pass: parts[i] = (start, chunk) continues row `first + i` of `start` tokens.
        Returns the chunks' last hidden states, (n, d). A short chunk is padded behind its row's
        end, where the mask hides the padding until tokens overwrite it."""
        (starts, chunks), n, device = zip(*parts, strict=True), len(parts), model.device
        ids, rows = pad(chunks).to(device), torch.arange(n, device=device)  # (n, C), (n,)
        steps = torch.arange(ids.shape[1], device=device)
        self.positions = torch.tensor(starts, device=device)[:, None] + steps  # (n, C)
        self.window, self.index = slice(first, first + n), first + rows[:, None]
        self.width = max(start + len(chunk) for start, chunk in parts)
        if (needed := max(starts) + len(steps)) > self.capacity:  # at least doubles: that is rare
            extra = max(needed - self.capacity, self.capacity)
            self.capacity += extra
            for i, store in enumerate(self.stores):  # one by one: never the whole cache twice
                self.stores[i] = nn.functional.pad(store, (0, 0, 0, extra))
        # A query at position p sees keys at positions up to p: (n, 1, C, width), for every head.
        mask = torch.arange(self.width, device=device) <= self.positions[:, None, :, None]
        decoder = model.get_decoder()
        own = {cache_argument(type(decoder)): self}
        output = decoder(
            input_ids=ids, attention_mask=mask, use_cache=True, position_ids=self.positions, **own
        )
        ends = torch.tensor([len(chunk) - 1 for chunk in chunks], device=device)
        return output.last_hidden_state[rows, ends]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Attention hands in new keys and values, (n, H, C, D), and gets all, (n, H, width, D)."""
        if 2 * layer == len(self.stores):
            # Zeros, not empty memory: a masked column's weight is 0, but 0 * NaN is NaN.
            self.stores += [
                new.new_zeros(self.rows, new.shape[1], self.capacity, new.shape[3])
                for new in (keys, values)
            ]
        stores = self.stores[2 * layer : 2 * layer + 2]
        for store, new in zip(stores, (keys, values), strict=True):
            store[self.index, :, self.positions] = new.transpose(1, 2)  # (n, C, H, D)
        return tuple(store[self.window, :, : self.width] for store in stores)

    def copy(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Row targets[i] becomes what row sources[i] was, in its first `width` columns."""
        for store in self.stores:
            store[targets, :, :width] = store[sources, :, :width]
