"""KV-cached batched generation, written by hand, for rows that live through several turns.

    decoder = Decoder(model, prompts, ...)                  # equal prompts are computed once
    results = decoder.turn(rows, max_new_tokens, keys)      # sample until a tag, eos or the budget
    decoder.append(rows, documents)                         # documents join the next forward
    results = decoder.turn(rows, ...)                       # and so on; finished rows just stay out

- **No padding between tokens.** Each row of the cache is written at its own length, with its own
  positions and mask, so rows of any lengths share a batch and none sees a pad on its left.
- **Every token is computed once.** A turn's last token is *pending*: it has been sampled but not
  been through the model, and is fed with whatever follows it. The cache outlives the turn.
- **Rows that have stopped leave.** Live rows are swapped to the front of the cache: the decode
  batch is a view of it, `cache[:n]`.
Left out: beam search, top-k and top-p, paged memory, compiled graphs.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn

from minizs.cache import RowCache, feed, row_limit
from minizs.logprobs import check_supported, log_distribution
from minizs.randomness import hash64
from minizs.sampling import StopStrings, draw, uniforms

Ints = int | Sequence[int]  # one number or several
FORWARD_TOKENS = 8192  # most positions in one forward pass: more go in groups of rows


@dataclass
class Generated:
    """What one row wrote in one turn. `reason` is "stop", "eos" or "length"."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str = "length"


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """No gradients, eval mode and SDPA inside; afterwards all is as it was. Only SDPA takes our
    boolean mask of four dimensions: eager attention would add its ones to the scores."""
    config, attention = model.config, model.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    config._attn_implementation = "sdpa"
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        config._attn_implementation = attention
        for module in training:
            module.training = True


class Decoder:
    """Rows (one a prompt, numbered from 0) that grow turn by turn; see the top of this file.
    `eos_id`: an id or several; None is the model's own, `()` is none. `capacity`: tokens a row is
    expected to reach (the cache doubles when that was too few); `limit`: the most it may reach.
    `positions` counts the tokens that have been through the model. A prompt's last token is pending
    like any turn's: a shared prompt is computed once but for this token, which each row feeds.
    Raises ValueError for an empty prompt, an id that the model does not have, a row that may
    outgrow `limit`, stop strings without a tokenizer, and models that this loop would get wrong."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], *, capacity: int = 0,
                 vocab_size: int | None = None, temperature: float = 1.0, seed: int = 0,
                 eos_id: Ints | None = None, tokenizer=None, stop: Sequence[str] = ()):  # fmt: skip
        check_supported(model)
        self.model, self.limit, self.vocab_size = model, row_limit(model), vocab_size
        self.temperature, self.seed, self.positions = temperature, seed, 0
        self.stop = StopStrings((stop,) if isinstance(stop, str) else tuple(stop), tokenizer)
        for source in (model.generation_config, model.config):
            eos_id = getattr(source, "eos_token_id", None) if eos_id is None else eos_id
        self.eos = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
        self._check(prompts)
        heads, rows = [tuple(prompt[:-1]) for prompt in prompts], range(len(prompts))
        # The longest first: where they go through the model in groups, there is little padding.
        place = {head: i for i, head in enumerate(sorted(dict.fromkeys(heads), key=len)[::-1])}
        self.cache = RowCache(len(rows), max(capacity, *map(len, prompts)))
        # The row that each slot of the cache holds, and each row's tokens that it holds.
        self.order, self.length = list(rows), [0] * len(rows)
        self.pending = [list(head) for head in place]  # tokens of each row still to be fed
        with decoding(model):
            if any(place):  # not if every prompt is a single token
                self._feed(len(place))
            self.order.sort(key=lambda row: place[heads[row]])
            if len(place) < len(rows):  # a group's rows are copies
                self.cache.copy([place[heads[row]] for row in self.order], rows, max(self.length))
        self.length = [len(head) for head in heads]
        self.pending = [[prompt[-1]] for prompt in prompts]

    def append(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
        """Remember tokens (documents) that follow each row; the row's next turn feeds them."""
        self._check(chunks)
        for row, chunk in zip(rows, chunks, strict=True):
            self.pending[row] += chunk

    def turn(self, rows: Sequence[int], max_new_tokens: Ints,
             keys: Sequence[Ints]) -> list[Generated]:  # fmt: skip
        """Let these (distinct) rows write until a stop string, eos (both are kept) or the budget of
        `max_new_tokens`, one number or one a row. Random numbers hang on the seed, the row's
        `keys`, which must differ from turn to turn, and the position, not on the batch's layout."""
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(rows)
        budget = dict(zip(rows, max_new_tokens, strict=True))
        for row, new in budget.items():
            if (longest := self.length[row] + len(self.pending[row]) + new) > self.limit:
                raise ValueError(f"a row may reach {longest} tokens, which exceeds {self.limit}")
        keys = [(key,) if isinstance(key, int) else key for key in keys]
        states = {row: hash64(self.seed, *key) for row, key in zip(rows, keys, strict=True)}
        results = {row: Generated() for row in rows}
        with decoding(self.model):
            live = rows
            for position in count():
                live = [r for r in live if results[r].reason == "length" and position < budget[r]]
                if not live:
                    return list(results.values())
                live = self._to_front(live)
                numbers = uniforms([states[row] for row in live], position)
                drawn = self._sample(self._feed(len(live)), numbers)
                for row, token, logprob in zip(live, *drawn, strict=True):
                    self.pending[row], result = [token], results[row]
                    result.ids.append(token)
                    result.logprobs.append(logprob)
                    if token in self.eos:
                        result.reason = "eos"
                    elif self.stop.complete(result.ids):
                        result.reason = "stop"

    def _check(self, chunks: Sequence[Sequence[int]]) -> None:
        size = self.model.config.vocab_size
        if not all(len(chunk) and min(chunk) >= 0 and max(chunk) < size for chunk in chunks):
            raise ValueError(f"an empty chunk, or an id outside the model's vocabulary of {size}")

    def _to_front(self, rows: Sequence[int]) -> list[int]:
        """Make these rows the first in the cache; returns them in the order they then have."""
        wanted, n = set(rows), len(rows)
        holes = [slot for slot in range(n) if self.order[slot] not in wanted]
        if holes:
            movers = [slot for slot in range(n, len(self.order)) if self.order[slot] in wanted]
            self.cache.copy(movers + holes, holes + movers, max(self.length))
            for a, b in zip(holes, movers, strict=True):
                self.order[a], self.order[b] = self.order[b], self.order[a]
        return self.order[:n]

    def _feed(self, n: int) -> Tensor:
        """Pending tokens of the first n slots go through the model: their last states, (n, d)."""
        rows, states = self.order[:n], []
        size = max(1, FORWARD_TOKENS // max(len(self.pending[row]) for row in rows))
        for first in range(0, n, size):
            some = rows[first : first + size]
            starts, chunks = [self.length[r] for r in some], [self.pending[r] for r in some]
            states.append(feed(self.model, self.cache, first, starts, chunks))
        for row in rows:
            self.length[row] += len(self.pending[row])
            self.positions += len(self.pending[row])
            self.pending[row] = []
        return torch.cat(states)

    def _sample(self, hidden: Tensor, uniform: Tensor) -> tuple[list[int], list[float]]:
        """A token and its log-probability for each of the hidden states (n, d)."""
        logits = self.model.get_output_embeddings()(hidden)  # (n, V)
        logp = log_distribution(logits, self.temperature, self.vocab_size)
        ids = logp.argmax(-1) if self.temperature == 0 else draw(logp, uniform)
        chosen = logp.gather(-1, ids[:, None]).squeeze(-1)
        # One copy to the host a step; float32 holds every id below 2^24 exactly.
        tokens, logprobs = torch.stack([ids.float(), chosen.float()]).tolist()
        if any(map(math.isnan, logprobs)):
            raise FloatingPointError("the model's logits are NaN")
        return [int(token) for token in tokens], logprobs


def generate(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: Ints,
             temperature: float = 1.0, stop: Sequence[str] = (), seed: int = 0,
             keys: Sequence[Ints] | None = None, vocab_size: int | None = None,
             tokenizer=None, eos_id: Ints | None = None) -> list[Generated]:  # fmt: skip
    """One turn for each prompt: see `Decoder`. `keys`: by default a row's index."""
    if not prompts:
        return []
    decoder = Decoder(model, prompts, vocab_size=vocab_size, temperature=temperature, seed=seed,
                      eos_id=eos_id, tokenizer=tokenizer, stop=stop)  # fmt: skip
    rows = range(len(prompts))
    return decoder.turn(rows, max_new_tokens, rows if keys is None else keys)
