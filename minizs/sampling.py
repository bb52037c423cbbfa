"""One step of sampling: which token comes next, and does it end the turn?

Left out: top-k and top-p. The distribution that is sampled must be the one that is scored."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minizs.models.precision import widest_float
from minizs.randomness import GOLDEN, mix64


def uniforms(states: list[int], position: int) -> Tensor:
    """`uniform(*keys, position)` of many rows, from each row's `hash64(*keys)`: (n,) float64."""
    folded = np.array(states, np.uint64) ^ np.uint64(position)
    hashed = mix64(folded + np.uint64(GOLDEN))  # NumPy's uint64 wraps by itself
    return torch.from_numpy((hashed >> 11) / 2**53)


def draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: (n, V) log-probabilities and (n,) numbers in [0, 1) -> (n,) ids."""
    wide = widest_float(logp.device)  # so that 150,000 small terms add up exactly enough
    cdf = logp.exp().cumsum(-1, dtype=wide)  # (n, V)
    total = cdf[:, -1:]
    target = uniform.to(wide).to(logp.device)[:, None] * total
    # Strictly below the total, the first entry above the target has a probability above 0.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    ids = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    return ids.clamp(max=logp.shape[-1] - 1)  # only NaNs get here; the caller reports them


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
        self.stop, self.tokenizer = stop, tokenizer
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
