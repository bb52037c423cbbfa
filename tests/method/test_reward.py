"""Answer normalisation, F1, exact match, substring match."""

import string

import pytest

from minizs.reward import exact_match, f1_score, normalize_answer, substring_match


def slow_f1(prediction: str, gold: str) -> float:
    """A second computation: cross shared words off a list, then 2PR / (P + R)."""

    def words(text: str) -> list[str]:
        letters = "".join(c for c in text.lower() if c not in string.punctuation)
        return [word for word in letters.split() if word not in ("a", "an", "the")]

    predicted, remaining, shared = words(prediction), words(gold), 0
    for word in predicted:
        if word in remaining:
            remaining.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(words(gold))
    return 2 * precision * recall / (precision + recall)


def test_normalisation():
    """The order counts: punctuation goes before articles, and only whole words are articles."""
    assert normalize_answer("  The  U.S.A., an\tEmpire of a THEATRE! ") == "usa empire of theatre"
    assert normalize_answer("the-cat") == "thecat"
    assert normalize_answer("The a an !?") == ""


def test_f1_by_hand():
    """Two of three predicted words and two of two gold words: P = 2/3, R = 1, F1 = 0.8."""
    assert f1_score("Barack Hussein Obama", ["Barack Obama"]) == pytest.approx(0.8)
    assert f1_score("Obama", ["Barack Obama"]) == pytest.approx(2 / 3)
    assert f1_score("Merkel", ["Barack Obama"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("the the dog dog", "dog"),  # a word repeated on one side counts once
        ("New York, New York", "New York City"),
        ("so good they named it New York New York", "New York, New York"),  # but twice here
        ("it is Paris or London or Rome or Berlin", "Berlin"),
        ("a b c", "c b a"),
        ("yes", "no"),
    ],
)
def test_f1_against_second_computation(prediction, gold):
    """Guards against counting words as a set."""
    assert f1_score(prediction, [gold]) == pytest.approx(slow_f1(prediction, gold))


def test_best_gold_answer_wins():
    """Scoring only the first alias punishes correct answers."""
    golds = ["United States of America", "USA"]
    assert f1_score("U.S.A.", golds) == exact_match("U.S.A.", golds) == 1.0
    assert substring_match("in the USA today", golds) == 1.0
    assert exact_match("America", "America") == 1.0  # one string is one gold, not seven letters


def test_exact_match_is_not_substring_match():
    """The paper's "EM" was a substring test, which naming every candidate satisfies."""
    answer = "it is Paris or London or Rome or Berlin"
    assert exact_match(answer, ["Berlin"]) == 0.0
    assert substring_match(answer, ["Berlin"]) == 1.0
    assert f1_score(answer, ["Berlin"]) == pytest.approx(0.2)  # 1 of 9 words: 2 * 1 / (9 + 1)
    assert substring_match("Berl", ["Berlin"]) == 0.0  # the other way round rewards saying little


@pytest.mark.parametrize("score", [f1_score, exact_match, substring_match])
@pytest.mark.parametrize("nothing", [None, "", "   ", "the", "...", "A."])
def test_no_answer_scores_zero(score, nothing):
    """An empty prediction equals an empty gold, and an empty gold is contained in everything."""
    assert score(nothing, ["Berlin"]) == 0.0
    assert score(nothing, ["The", ""]) == 0.0
    assert score("Berlin", []) == 0.0
    assert score("Berlin", [nothing or ""]) == 0.0
    assert score("Berlin", [nothing or "", "Berlin"]) == 1.0


def test_equal_scores_are_equal_floats():
    """F1 is symmetric; a last bit of difference would give a flat group an advantage."""
    for words in range(2, 30):
        long, short = " ".join(f"w{i}" for i in range(words)), "w0 w1"
        assert f1_score(long, [short]) == f1_score(short, [long])
