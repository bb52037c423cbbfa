"""KV-cached batched generation, written by hand, for rows that live through several turns.

    decoder = Decoder(model, prompts, ...)                  # equal prompts are computed once
    results = decoder.turn(rows, max_new_tokens, keys)      # sample until a tag, eos or the budget
    decoder.append(rows, documents)                         # they join the next turn, and so on

Each cache row has its own length: no padding. Every token is computed once: the cache outlives the
turn, whose last token is *pending*: sampled, but fed to the model with whatever follows it. Rows
that have stopped leave: the live ones are swapped to the front, and the batch is `cache[:n]`.
Left out: beam search, top-k and top-p, paged memory, compiled graphs."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minizs.cache import RowCache, row_limit
from minizs.logprobs import check_supported, log_distribution
from minizs.models.composite import text_config
from minizs.randomness import hash64
from minizs.sampling import StopStrings, draw, uniforms

Ints = int | Sequence[int]  # one number or several
FORWARD_TOKENS = 2048  # most positions in one forward pass: more go in groups of rows


@dataclass
class Generated:
    """What one row wrote in one turn. `reason` is "stop", "eos" or "length"."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str = "length"


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """No gradients, eval mode, and SDPA: eager attention would add a boolean mask to the scores."""
    config = text_config(model)
    attention = config._attn_implementation
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
    """Rows, one a prompt, that grow turn by turn. `eos_id`: None is the model's own, `()` is none.
    `ends_turn` says of a turn's text whether it ends at a stop string; without it every one does.
    `positions` counts tokens fed. Raises ValueError for what it, or the model, would get wrong."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        eos_id: Ints | None = None,
        tokenizer=None,
        stop: Sequence[str] = (),
        ends_turn: Callable[[str], bool] | None = None,
    ):
        check_supported(model)
        self.model, self.limit, self.vocab_size = model, row_limit(model), vocab_size
        self.temperature, self.seed, self.positions = temperature, seed, 0
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self.stop = StopStrings(stop, tokenizer, ends_turn)
        for source in (model.generation_config, model.config):
            eos_id = getattr(source, "eos_token_id", None) if eos_id is None else eos_id
        self.eos = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
        size = text_config(model).vocab_size
        if not all(len(ids) and min(ids) >= 0 and max(ids) < size for ids in prompts):
            raise ValueError(f"a prompt is empty, or outside the model's vocabulary of {size}")
        # A prompt's last token is pending like any turn's. What is before it, its head, is computed
        # once: different heads go through the model as if they were rows, and are then copied to
        # their rows' slots. The longest come first, so that groups of them hold little padding.
        rows, heads = range(len(prompts)), [tuple(ids[:-1]) for ids in prompts]
        place = {head: i for i, head in enumerate(sorted(dict.fromkeys(heads), key=len)[::-1])}
        self.cache = RowCache(len(rows), 2 * max(map(len, prompts), default=0))
        # The row in each slot of the cache; each row's tokens that it holds, and those to be fed.
        self.order, self.length, self.pending = list(rows), [0] * len(rows), list(map(list, place))
        with decoding(model):
            if long := sum(map(bool, place)):  # prompts of more than one token
                self._feed(range(long))
            self.order.sort(key=lambda row: place[heads[row]])
            if len(place) < len(rows):  # a group's rows are copies
                self.cache.copy([place[heads[row]] for row in self.order], rows, max(self.length))
        self.length, self.pending = list(map(len, heads)), [[ids[-1]] for ids in prompts]

    def append(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
        """Remember tokens (documents) that follow each row; the row's next turn feeds them."""
        for row, chunk in zip(rows, chunks, strict=True):
            self.pending[row] += chunk

    def turn(
        self, rows: Sequence[int], max_new_tokens: Ints, keys: Sequence[Ints]
    ) -> list[Generated]:
        """Let these (distinct) rows write until a stop string, eos (both are kept) or the budget of
        `max_new_tokens`, one number or one a row. Random numbers hang on the seed, the row's
        `keys`, which must differ from turn to turn, and the position, not on the batch's layout."""
        most = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else max_new_tokens
        budget, live, position = dict(zip(rows, most, strict=True)), rows, 0
        if any(self.length[r] + len(self.pending[r]) + budget[r] > self.limit for r in rows):
            raise ValueError(f"a row may exceed the model's limit of {self.limit} tokens")
        keys = [(key,) if isinstance(key, int) else key for key in keys]
        states = {row: hash64(self.seed, *key) for row, key in zip(rows, keys, strict=True)}
        out = {row: Generated() for row in rows}
        with decoding(self.model):
            while live := [r for r in live if out[r].reason == "length" and position < budget[r]]:
                live, hidden = self._feed(live)
                drawn = self._sample(hidden, uniforms([states[row] for row in live], position))
                for row, token, logprob in zip(live, *drawn, strict=True):
                    self.pending[row], result = [token], out[row]
                    result.ids.append(token)
                    result.logprobs.append(logprob)
                    if token in self.eos or self.stop.complete(result.ids):
                        result.reason = "eos" if token in self.eos else "stop"
                position += 1
        return list(out.values())

    def _feed(self, rows: Sequence[int]) -> tuple[list[int], Tensor]:
        """Swap these rows to the front of the cache and put their pending tokens through the model.
        Returns the rows in the order they then have, and their last hidden states (n, d)."""
        wanted, n = set(rows), len(rows)
        holes = [slot for slot in range(n) if self.order[slot] not in wanted]
        if holes:
            movers = [slot for slot in range(n, len(self.order)) if self.order[slot] in wanted]
            self.cache.copy(movers + holes, holes + movers, max(self.length))
            for a, b in zip(holes, movers, strict=True):
                self.order[a], self.order[b] = self.order[b], self.order[a]
        rows = self.order[:n]
        parts = [(self.length[row], self.pending[row]) for row in rows]
        size = max(1, FORWARD_TOKENS // max(len(chunk) for _, chunk in parts))
        states = [self.cache.feed(self.model, i, parts[i : i + size]) for i in range(0, n, size)]
        for row in rows:
            self.length[row] += len(self.pending[row])
            self.positions += len(self.pending[row])
        return rows, torch.cat(states)

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
        return list(map(int, tokens)), logprobs


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Ints,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    keys: Sequence[Ints] | None = None,
    vocab_size: int | None = None,
    tokenizer=None,
    eos_id: Ints | None = None,
) -> list[Generated]:
    """One turn for each prompt: see `Decoder`. `keys`: by default a row's index."""
    decoder = Decoder(
        model,
        prompts,
        vocab_size=vocab_size,
        temperature=temperature,
        seed=seed,
        eos_id=eos_id,
        tokenizer=tokenizer,
        stop=stop,
    )
    return decoder.turn(range(len(prompts)), max_new_tokens, keys or range(len(prompts)))
