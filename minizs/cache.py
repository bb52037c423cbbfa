"""A key-value cache whose rows each have their own length, written at their ends in memory taken
ahead. (The `transformers` ones pad on the left, and copy everything to append a column.)

Left out: paged memory, and dropping the keys that a sliding window has left behind."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import Cache

from minizs.models import flash
from minizs.models.batches import pad
from minizs.models.composite import text_config
from minizs.models.support import FULL, SLIDING, layer_kinds


def visible_keys(config, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
    """Which keys each query sees: (n, 1, C, width) bool, as `transformers` takes it.

    A query at position p (`positions` is (n, C)) sees keys at positions up to p, and in a sliding
    window of w tokens only those from p - w + 1 on. Models with layers of both kinds take a
    dictionary of masks, one a kind."""
    columns = torch.arange(width, device=positions.device)
    ends = positions[:, None, :, None]  # (n, 1, C, 1)
    masks = {FULL: columns <= ends}
    kinds = layer_kinds(config)
    if SLIDING in kinds:
        masks[SLIDING] = masks[FULL] & (columns > ends - config.sliding_window)
    return masks if len(kinds) > 1 else masks[kinds.pop()]


def added_to_scores(mask: Tensor | dict[str, Tensor], dtype: torch.dtype):
    """A boolean mask, or one a kind of layer, as eager attention takes it: 0 where a key is seen,
    else the least number of this type."""
    if isinstance(mask, dict):
        return {kind: added_to_scores(one, dtype) for kind, one in mask.items()}
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(dtype).min
    )


@cache
def cache_argument(decoder: type[nn.Module]) -> str:
    """What a family's forward calls the cache: versions of `transformers` differ."""
    return "cache" if "cache" in signature(decoder.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class Step:
    """Where one forward pass puts its keys and values: those of token `[i, j]` go to row
    `first + i`, at position `positions[i, j]`. Its queries see the first `width` columns."""

    first: int
    positions: Tensor  # (n, C)
    width: int

    @cached_property
    def rows(self) -> Tensor:
        """The rows of the cache, (n, 1)."""
        count = len(self.positions)
        return torch.arange(self.first, self.first + count, device=self.positions.device)[:, None]


class RowCache(Cache):
    """Keys and values of every layer, (B, H, capacity, D) each, every row with its own length."""

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self.capacity = capacity
        self.stores: list[Tensor] = []  # layer 0's keys, its values, layer 1's keys, ...
        self.step: Step | None = None  # that of the forward pass under way

    def reserve(self, columns: int) -> None:
        """Make room for rows of this many tokens."""
        if columns <= self.capacity:
            return
        self.capacity = columns
        for i, store in enumerate(self.stores):  # one by one: never the whole cache twice
            self.stores[i] = self._room_for(store)
            self.stores[i][:, :, : store.shape[2]] = store

    def feed(self, model: nn.Module, first: int, parts: list[tuple[int, list[int]]]) -> Tensor:
        """One forward pass: parts[i] = (start, chunk) continues row `first + i` of `start` tokens.
        Returns the chunks' last hidden states, (n, d). A short chunk is padded behind its row's
        end, where the mask hides the padding until tokens overwrite it."""
        starts, chunks = zip(*parts, strict=True)
        device = model.device
        ids = pad(chunks).to(device)  # (n, C)
        steps = torch.arange(ids.shape[1], device=device)  # (C,)
        positions = torch.tensor(starts, device=device)[:, None] + steps  # (n, C)
        columns = max(starts) + ids.shape[1]
        if columns > self.capacity:  # at least doubles, so that it is rare
            self.reserve(max(columns, 2 * self.capacity))
        width = max(start + len(chunk) for start, chunk in parts)
        states = self.forward(model, ids, Step(first, positions, width))  # (n, C, d)
        ends = torch.tensor([len(chunk) - 1 for chunk in chunks], device=device)
        return states[torch.arange(len(parts), device=device), ends]

    def forward(self, model: nn.Module, ids: Tensor, step: Step) -> Tensor:
        """The decoder's last hidden states of these tokens: (n, C) ids -> (n, C, d)."""
        config = text_config(model)
        if config._attn_implementation == flash.ROWS:  # takes lengths in place of masks
            step = replace(step, width=self.capacity)
            mask = flash.row_lengths(step.positions)
        else:
            mask = visible_keys(config, step.positions, step.width)
            if config._attn_implementation == "eager":
                mask = added_to_scores(mask, model.dtype)
        self.step = step
        # Padding stands where no row has a token: a family that turns all positions otherwise in
        # longer rows, or has learned ones, must not see it there.
        positions = step.positions.clamp(max=step.width - 1) if ids.shape[1] > 1 else step.positions
        output = model.get_decoder()(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_argument(type(model.get_decoder())): self},
        )
        return output.last_hidden_state

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Attention hands in new keys and values, (n, H, C, D), and gets all, (n, H, width, D)."""
        step = self.step
        if 2 * layer == len(self.stores):
            self.stores += [self._room_for(keys), self._room_for(values)]
        views = []
        for store, new in zip(self.stores[2 * layer : 2 * layer + 2], (keys, values), strict=True):
            store[step.rows, :, step.positions] = new.transpose(1, 2)  # (n, C, H, D)
            views.append(store[step.first : step.first + len(new), :, : step.width])
        return tuple(views)

    def _room_for(self, tensor: Tensor) -> Tensor:
        """Zeros (B, H, capacity, D) for the heads of a tensor (n, H, C, D). Not empty memory: a
        masked column's weight is 0, but 0 * NaN is NaN."""
        _, heads, _, dim = tensor.shape
        if tensor.is_cuda:  # in memory a token's heads lie side by side, as flash attention reads
            zeros = tensor.new_zeros(self.rows, self.capacity, heads, dim)
            return zeros.transpose(1, 2)
        return tensor.new_zeros(self.rows, heads, self.capacity, dim)

    def copy(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Row targets[i] becomes what row sources[i] was, in its first `width` columns."""
        if not self.stores or not targets:
            return
        device = self.stores[0].device
        sources = torch.tensor(sources, device=device)
        targets = torch.tensor(targets, device=device)
        for store in self.stores:
            store[targets, :, :width] = store[sources, :, :width]
