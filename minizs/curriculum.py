"""The curriculum: how often the simulated search engine returns noisy documents at a step.

Early in training most documents are useful, and the policy learns the format and that searching
pays; later more of them are noisy, and it has to reason about what it was given.
Left out: the paper's comparison with a random curriculum is start = end = 0.5, and needs no code.
"""

import math


def noise_probability(step: int, total_steps: int, start: float, end: float,
                      base: float = 4.0) -> float:  # fmt: skip
    """The probability that the documents of one search are noisy (paper §3.4, equation 1):

        p_i = p_s + (b^(i/m) - 1) / (b - 1) * (p_e - p_s)

    with i = `step` counted from 1, m = `total_steps`, p_s = `start`, p_e = `end`, b = `base`.
    b > 1 keeps the noise near `start` for long (b = 4 is 1/3 of the way at half time), b < 1 raises
    it early, and b = 1 is the limit, a straight line. Steps past the end stay at `end`.
    """
    shares, bounded = 0 <= start <= 1 and 0 <= end <= 1, 0 < base < math.inf
    if not (shares and bounded and step >= 0 and total_steps >= 1):
        raise ValueError(f"no curriculum: {step=}, {total_steps=}, {start=}, {end=}, {base=}")
    if step >= total_steps:
        return end  # exactly, whatever rounding would make of the formula
    progress = step / total_steps
    if base != 1.0:
        # expm1(x log b) = b^x - 1 without the cancellation that a base near 1 would suffer.
        progress = math.expm1(progress * math.log(base)) / math.expm1(math.log(base))
    return start + progress * (end - start)
