"""The noise curriculum."""

import math
from collections import Counter

import pytest

from minizs.curriculum import draw_questions, mean_noise, noise_probability


@pytest.mark.parametrize(("quarter", "expected"), [(1, 0.138071), (2, 1 / 3), (3, 0.609476)])
def test_paper_values(quarter, expected):
    """The values of equation 1 at each quarter. (The exponent is i/m, not i/m - 1.)"""
    assert noise_probability(quarter, 4, 0.0, 1.0) == pytest.approx(expected, abs=1e-6)
    # From p_s = 0.25 to p_e = 0.5 the same way lies within [0.25, 0.5].
    assert noise_probability(quarter, 4, 0.25, 0.5) == pytest.approx(0.25 + expected / 4, abs=1e-6)


@pytest.mark.parametrize("base", [0.3, 1 - 1e-15, 1.0, 1 + 3e-16, 1.0000001, 4.0, 100.0])
def test_whole_curve_against_the_equation(base):
    """Every step, and bases on both sides of 1, where the equation as written divides 0 by 0."""
    for step in range(1, 204):
        x = step / 203
        fraction = x if abs(base - 1) < 1e-3 else (math.pow(base, x) - 1) / (base - 1)
        got = noise_probability(step, 203, 0.75, 0.1, base)  # noise may also fall
        assert got == pytest.approx(0.75 + fraction * (0.1 - 0.75), abs=1e-7)


def test_ends_are_exact_and_the_end_stays():
    """A last step that misses its end by rounding, or a longer run that overshoots past it."""
    assert noise_probability(0, 200, 0.1, 0.75) == noise_probability(-9, 200, 0.1, 0.75) == 0.1
    for step in (200, 201, 10_000):
        assert noise_probability(step, 200, 0.1, 0.75) == 0.75


@pytest.mark.parametrize("base", [0.3, 1.0, 4.0])
def test_falling_noise_is_the_rising_one_in_a_mirror(base):
    """From end to start with base 1/b, noise falls as it rose from start to end with base b, and
    the means are those of one curve, but for one step of 50."""
    for step in range(51):
        falling = noise_probability(step, 50, 0.75, 0.1, 1 / base)
        assert falling == pytest.approx(noise_probability(50 - step, 50, 0.1, 0.75, base))
    gap = mean_noise(50, 0.1, 0.75, base) - mean_noise(50, 0.75, 0.1, 1 / base)
    assert gap == pytest.approx((0.75 - 0.1) / 50)


def test_mean_noise_by_hand():
    """Equation 1 at the halves of two steps; a constant is its own mean; no step is the end."""
    assert mean_noise(2, 0.1, 0.7) == pytest.approx(0.1 + 0.6 * (1 / 3 + 1) / 2)
    assert mean_noise(1000, 0.0, 1.0) == pytest.approx(1 / math.log(4) - 1 / 3, abs=1e-3)
    assert mean_noise(7, 0.3, 0.3, 9.0) == pytest.approx(0.3)
    assert mean_noise(0, 0.1, 0.7) == 0.7


def test_batches_hold_every_question_once_an_epoch():
    """An epoch is a permutation of all questions; a batch may run across its end."""
    indices = [i for step in range(1, 8) for i in draw_questions(step, 10, 4, seed=3)]
    assert len(indices) == 28
    for epoch in range(2):
        assert Counter(indices[10 * epoch : 10 * epoch + 10]) == Counter(range(10))
    assert indices[:10] != indices[10:20]  # a new order
    assert max(Counter(draw_questions(1, 3, 7, seed=0)).values()) == 3  # more than there are


def test_a_steps_questions_are_a_function_of_step_and_seed():
    """A resumed run draws the same questions without a cursor."""
    first = draw_questions(9, 100, 16, seed=1)
    assert first == draw_questions(9, 100, 16, seed=1)
    assert first != draw_questions(9, 100, 16, seed=2)
    assert first != draw_questions(10, 100, 16, seed=1)
