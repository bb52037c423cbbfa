"""One step of sampling: which token comes next, and does it end the turn?

Left out: top-k and top-p. The distribution that is sampled must be the one that is scored."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from minizs.logprobs import log_distribution
from minizs.models.precision import widest_float
from minizs.models.support import final_logits
from minizs.randomness import GOLDEN, mix64

BLOCK = 256  # tokens in a block of `draw`
SMALL = 2**16  # probabilities, n * V: up to so many need no blocks


def uniforms(states: list[int], position: int) -> Tensor:
    """`uniform(*keys, position)` of many rows, from each row's `hash64(*keys)`: (n,) float64."""
    folded = np.array(states, np.uint64) ^ np.uint64(position)
    hashed = mix64(folded + np.uint64(GOLDEN))  # NumPy's uint64 wraps by itself
    return torch.from_numpy((hashed >> 11) / 2**53)


def sample(
    model: nn.Module, hidden: Tensor, uniform: Tensor, temperature: float, vocab_size: int | None
) -> tuple[Tensor, Tensor]:
    """The next token and its log-probability after each of the hidden states (n, d): (n,) each."""
    logits = final_logits(model, hidden)  # (n, V)
    logp = log_distribution(logits, temperature, vocab_size)
    ids = logp.argmax(-1) if temperature == 0 else draw(logp, uniform)
    return ids, logp.gather(-1, ids[:, None]).squeeze(-1)


def draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: (n, V) log-probabilities and (n,) numbers in [0, 1) -> (n,) ids.

    The first token at which the cumulative probability exceeds the number is the one drawn. It is
    found in two steps, first its block of 256 tokens and then its place there: adding up 150,000
    numbers one after the other is slow, on a GPU above all. (Few numbers are added up at once.)"""
    wide = widest_float(logp.device)  # so that 150,000 small terms add up exactly enough
    probabilities = logp.exp()  # (n, V)
    uniform = uniform.to(wide).to(logp.device)[:, None]
    if probabilities.numel() <= SMALL:
        cdf = probabilities.cumsum(1, dtype=wide)
        return _first_above(cdf, uniform * cdf[:, -1:]).squeeze(1)
    vocab = probabilities.shape[1]
    whole = vocab // BLOCK * BLOCK
    blocks = probabilities[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1, dtype=wide)
    rest = probabilities[:, whole:].sum(-1, keepdim=True, dtype=wide)
    cdf = torch.cat([blocks, rest], dim=1).cumsum(1)  # (n, blocks + 1), up to each block's end
    target = uniform * cdf[:, -1:]
    block = _first_above(cdf, target)  # (n, 1)

    # What of the target is left where the block begins, and the block's own tokens.
    before = torch.nn.functional.pad(cdf, (1, 0)).gather(1, block)
    columns = block * BLOCK + torch.arange(BLOCK, device=logp.device)  # (n, BLOCK)
    inside = probabilities.gather(1, columns.clamp(max=vocab - 1)).to(wide)
    inside = inside.masked_fill(columns >= vocab, 0.0).cumsum(1)
    return (block * BLOCK + _first_above(inside, target - before)).squeeze(1)


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """Where each row of the cumulative sums (n, k) first exceeds its target (n, 1): (n, 1) indices.
    Rounding can put a target at the total. Strictly below the total, the first entry above it is
    one that adds something: no token of probability 0 is drawn."""
    total = cdf[:, -1:]
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    place = torch.searchsorted(cdf, target.contiguous(), right=True)
    return place.clamp(max=cdf.shape[1] - 1)  # only NaNs get here; the caller reports them


class StopStrings:
    """Whether the token just sampled completes a stop string. A tag can be several tokens, and its
    last one can hold what follows (`>\\n`): the turn's tail is decoded, where the token's own text
    (looked up once) holds the last character of a tag."""

    def __init__(
        self,
        stop: tuple[str, ...],
        tokenizer,
        ends_turn: Callable[[str], bool] | None = None,
    ) -> None:
        if stop and (tokenizer is None or not all(stop)):
            raise ValueError("stop strings need a tokenizer and must not be empty")
        self.stop = stop
        self.tokenizer = tokenizer
        self.ends_turn = ends_turn  # asked about the whole turn where a stop string is complete
        # A token is at least a byte of the tag. (One more, as decoding may trim a leading space.)
        self.reach = 1 + max((len(s.encode()) for s in stop), default=0)
        # U+FFFD: the token ends within a character, possibly a tag's last one.
        self.last = {"\ufffd", *(s[-1] for s in stop)}
        self.may_end: dict[int, bool] = {}  # by token, once seen

    def complete(self, ids: list[int]) -> bool:
        """Whether the turn ends here; `ids` are its tokens so far. With `ends_turn`, a stop string
        ends it only if that agrees: a tag inside a thought, say, may be one that does nothing."""
        if not self.stop:
            return False
        decode = partial(
            self.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if ids[-1] not in self.may_end:
            self.may_end[ids[-1]] = not self.last.isdisjoint(decode(ids[-1:]))
        tail = decode(ids[-self.reach :]) if self.may_end[ids[-1]] else ""
        if not any(s in tail for s in self.stop):
            return False
        return self.ends_turn is None or self.ends_turn(decode(ids))
