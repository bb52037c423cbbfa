"""A key-value cache for `transformers` models whose rows each have their own length.

The library's own caches give all rows one length, so that prompts have to be padded on the left,
and copy everything at each step to append a column. Here memory is taken ahead, each row is
written at its own end, and attention reads a view of the rows and columns in use. What makes that
right is an explicit mask and explicit positions; `feed` sets all of it up for one forward pass.

Left out: paged memory, sliding windows (refused beyond the window), quantised keys.
"""

import torch
from torch import Tensor, nn
from transformers import Cache


class RowCache(Cache):
    """Keys and values of every layer, (B, H, capacity, D) each, every row with its own length."""

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.rows, self.capacity = rows, capacity
        self.stores: list[Tensor] = []  # layer 0's keys, its values, layer 1's keys, ...

    def reserve(self, columns: int) -> None:
        """Have room for so many columns: at least doubled, so that growing stays rare."""
        if columns > self.capacity:
            extra = max(columns, 2 * self.capacity) - self.capacity
            self.capacity += extra
            for i, store in enumerate(self.stores):  # one by one: never the whole cache twice
                self.stores[i] = nn.functional.pad(store, (0, 0, 0, extra))

    def aim(self, first: int, positions: Tensor, width: int) -> None:
        """Next: write rows `first`... at `positions` (n, C), read their columns up to `width`."""
        end = first + len(positions)
        self.window, self.width, self.positions = slice(first, end), width, positions
        self.index = torch.arange(first, end, device=positions.device)[:, None]  # (n, 1)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with its new keys and values, (n, H, C, D).

        Stores them and returns all that these rows have, (n, H, width, D): views, not copies.
        """
        views = []
        for place, new in ((2 * layer, keys), (2 * layer + 1, values)):
            if place == len(self.stores):
                # Zeros, not empty memory: a masked column's weight is 0, but 0 * NaN is NaN.
                shape = (self.rows, new.shape[1], self.capacity, new.shape[3])
                self.stores.append(new.new_zeros(shape))
            store = self.stores[place]
            store[self.index, :, self.positions] = new.transpose(1, 2)  # (n, C, H, D)
            views.append(store[self.window, :, : self.width])
        return views[0], views[1]

    def swap(self, a: list[int], b: list[int], width: int) -> None:
        """Exchange rows a[i] and b[i], which hold `width` columns at most."""
        for store in self.stores:
            used = store[:, :, :width]
            used[a + b] = used[b + a]

    def select(self, rows: list[int]) -> None:
        """Keep copies of these rows, in this order; a row may be named several times."""
        self.rows = len(rows)
        for i, store in enumerate(self.stores):
            self.stores[i] = store[rows]


def row_limit(model: nn.Module) -> int:
    """The most tokens a row of this model may have.

    That is its positions or, where it is shorter, its sliding window: inside it such a layer is an
    ordinary one. Raises ValueError for layers that keep anything but keys and values.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"not supported: layers of type {sorted(kinds)}")
    window = getattr(model.config, "sliding_window", None)
    return min(model.config.max_position_embeddings, window or 2**31)


def feed(model: nn.Module, cache: RowCache, first: int, starts: list[int],
         chunks: list[list[int]]) -> Tensor:  # fmt: skip
    """Run one chunk of tokens for each of n cache rows, from row `first` on, in one forward pass.

    `starts[i]` is how many tokens row `first + i` has; `chunks[i]` follows them. Chunks may have
    different lengths: the padding behind a short one is written behind its row's end, where the
    mask hides it until real tokens overwrite it. Returns each chunk's last hidden state, (n, d).
    """
    counts = [len(chunk) for chunk in chunks]
    longest = max(counts)
    padded = [chunk + [0] * (longest - len(chunk)) for chunk in chunks]
    ids = torch.tensor(padded, device=model.device)  # (n, C)
    steps = torch.arange(longest, device=model.device)
    positions = torch.tensor(starts, device=model.device)[:, None] + steps  # (n, C)
    width = max(start + count for start, count in zip(starts, counts, strict=True))
    # A query at position p sees the keys at positions up to p: (n, C, width).
    visible = torch.arange(width, device=model.device) <= positions[..., None]
    cache.reserve(max(starts) + longest)
    cache.aim(first, positions, width)
    output = model.get_decoder()(
        input_ids=ids,
        attention_mask=visible[:, None],  # (n, 1, C, width): the same for every head
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    last = torch.tensor(counts, device=model.device) - 1
    return output.last_hidden_state[torch.arange(len(chunks), device=model.device), last]
