"""The curriculum: what a step asks, and how often the simulated engine then returns noise.

Early in training most documents are useful, and the policy learns the format and that searching
pays. Later more of them are noisy, and it has to reason about what it was given. With start = end =
0.5 this is the paper's random curriculum.
"""

from minizs.randomness import hash64


def draw_questions(step: int, total: int, size: int, seed: int) -> list[int]:
    """The indices of the questions of a step, counted from 1, among `total` questions.

    They are a function of the seed, so that a resumed run needs no cursor. Every epoch is a fresh
    permutation of all questions, and a batch can run across its end.
    """
    first = (step - 1) * size
    epochs = range(first // total, (first + size - 1) // total + 1)
    order: list[int] = []
    for epoch in epochs:
        order += sorted(range(total), key=lambda index: hash64(seed, epoch, index))
    return order[first % total : first % total + size]


def noise_probability(
    step: int, total_steps: int, start: float, end: float, base: float = 4.0
) -> float:
    """The probability that the documents of one search are noisy (paper §3.4, equation 1):

        p_i = p_s + (b^(i/m) - 1) / (b - 1) * (p_e - p_s)

    with i = `step` counted from 1, m = `total_steps`, p_s = `start`, p_e = `end`, b = `base` > 0.
    A base above 1 keeps the noise near `start` for long: with b = 4 a third of the way is done at
    half time. A base below 1 raises it early, and b = 1 is the limit, a straight line. Before the
    first step the noise is `start`, and after the last one it stays at `end`.
    """
    if step >= total_steps:
        return end  # exactly, whatever rounding would make of the formula
    share = max(step, 0) / total_steps  # i/m
    way = share  # the fraction of the way from start to end
    if abs(base - 1) >= 1e-8:
        way = (base**share - 1) / (base - 1)
    return start + way * (end - start)


def mean_noise(total_steps: int, start: float, end: float, base: float = 4.0) -> float:
    """The mean of `noise_probability` over the steps of a run: its share of noisy replies, if every
    step searches equally often. With b = 4 it lies 0.39 of the way from `start` to `end`. A run
    without steps is at its end."""
    steps = range(1, max(1, total_steps) + 1)
    noises = [noise_probability(step, total_steps, start, end, base) for step in steps]
    return sum(noises) / len(noises)
