"""Randomness as a function of integers."""

import pytest

from minizs.randomness import GOLDEN, hash64, mix64, uniform


def test_mixing_is_splitmix64():
    """A wrong constant or shift still looks random: compare with published SplitMix64 outputs."""
    # The generator's outputs from seed 1234567 (Rosetta Code and the reference implementation).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix64((1234567 + i * GOLDEN) % 2**64) for i in (1, 2, 3)] == expected


def test_hash_is_the_documented_fold():
    """sampling.py repeats this hash on arrays: the definition must not drift."""
    step_by_step = mix64((3 + GOLDEN) % 2**64)
    step_by_step = mix64(((step_by_step ^ 5) + GOLDEN) % 2**64)
    assert hash64(3, 5) == step_by_step
    assert hash64(-1) == hash64(2**64 - 1)  # two's complement, as in an int64 tensor


def test_every_key_and_its_place_matter():
    """Keys that are summed or whose zeros vanish would give two tokens the same number."""
    keys = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (-1,)]
    assert len({hash64(*key) for key in keys}) == len(keys)
    grid = {hash64(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(grid) == 20**3


def test_uniform_is_uniform_along_every_key():
    """Neighbouring keys (the next token, the next sample) must give independent numbers."""
    n = 20_000
    for at in ((lambda i: (7, i, 1)), (lambda i: (i, 7, 1)), (lambda i: (7, 1, i))):
        numbers = [uniform(*at(i)) for i in range(n)]
        assert all(0.0 <= u < 1.0 for u in numbers)
        counts = [0] * 10
        for u in numbers:
            counts[int(10 * u)] += 1
        chi_square = sum((count - n / 10) ** 2 / (n / 10) for count in counts)
        assert chi_square < 33.7  # 9 degrees of freedom, one in 10,000
        covariance = sum((numbers[i] - 0.5) * (numbers[i - 1] - 0.5) for i in range(n)) / n
        assert covariance * 12 == pytest.approx(0.0, abs=4 / n**0.5)  # 1/12 is the variance
