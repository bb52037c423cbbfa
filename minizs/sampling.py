"""One step of sampling: which token comes next, and does it end the turn?

A token is drawn by inverting the cumulative distribution at a hash of where it stands
(randomness.py); a turn ends where its text completes a stop string.
Left out: top-k and top-p. The distribution that is sampled must be the one that is scored.
"""

import numpy as np
import torch
from torch import Tensor

from minizs.randomness import GOLDEN, mix64


def uniforms(states: list[int], position: int) -> Tensor:
    """`uniform(*keys, position)` of many rows, from each row's `hash64(*keys)`: (n,) float64."""
    folded = np.array(states, np.uint64) ^ np.uint64(position)
    hashed = mix64(folded + np.uint64(GOLDEN))  # NumPy's uint64 wraps by itself
    return torch.from_numpy((hashed >> 11) / 2**53)


def draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: (n, V) log-probabilities and (n,) numbers in [0, 1) -> (n,) ids."""
    # float64, so that 150,000 small terms add up exactly enough (Apple's GPUs have none).
    double = torch.float32 if logp.device.type == "mps" else torch.float64
    cdf = logp.exp().cumsum(-1, dtype=double)  # (n, V)
    total = cdf[:, -1:]
    target = uniform.to(logp.device, double)[:, None] * total
    # Strictly below the total, the first entry above the target has a probability above 0.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    ids = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    return ids.clamp(max=logp.shape[-1] - 1)  # only NaNs get here; the caller reports them


class StopStrings:
    """Whether the token just sampled completes a stop string. A tag can be several tokens, and its
    last one can hold what follows (`>\\n`), so the turn's tail is decoded, but only where the
    token's own text (looked up once) holds a tag's last character and no whole tag."""

    def __init__(self, stop: tuple[str, ...], tokenizer) -> None:
        if stop and (tokenizer is None or not all(stop)):
            raise ValueError("stop strings need a tokenizer and must not be empty")
        self.stop, self.tokenizer = stop, tokenizer
        # A token is at least one byte of the tag. (One more, as decoding may trim a leading space.)
        self.reach = 1 + max((len(s.encode()) for s in stop), default=0)
        self.seen: dict[int, tuple[bool, bool]] = {}  # token -> (holds a tag, may end one)

    def _decode(self, ids: list[int]) -> tuple[str, bool]:
        """The text of these tokens, and whether it holds a stop string."""
        plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        text = self.tokenizer.decode(ids, **plain)
        return text, any(s in text for s in self.stop)

    def complete(self, ids: list[int]) -> bool:
        """`ids` is the turn so far; no tag was complete before its last token."""
        if not self.stop:
            return False
        token = ids[-1]
        if token not in self.seen:
            text, whole = self._decode([token])
            # U+FFFD: the token ends within a character, possibly a tag's last one.
            self.seen[token] = whole, "\ufffd" in text or any(s[-1] in text for s in self.stop)
        whole, ends = self.seen[token]
        return whole or (ends and self._decode(ids[-self.reach :])[1])
