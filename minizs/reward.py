"""The reward: how well an answer matches the gold answers, as a number in [0, 1].

Training uses F1 (paper §3.5): a partly right answer gets its part, so that samples of a question
differ more often, and every extra word costs precision. In the paper's code, unlike here,
- "EM" asks whether the prediction contains a gold answer: naming many candidates scores 1;
- a rollout without an answer (here None, 0) is scored on the example in its prompt;
- a gold answer that normalises to nothing ("The", here 0) is contained in everything.
Left out: a reward for the format (the paper needed none), and any judge model."""

import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable


def normalize_answer(text: str) -> str:
    """SQuAD v1.1 normalisation: lower case, no ASCII punctuation, no a/an/the, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1_score(prediction: str | None, answers: Iterable[str]) -> float:
    """F1 = 2 IN / (PN + RN) with the best-matching gold answer (paper §3.5): PN and RN are the
    numbers of words in prediction and gold, IN that of shared ones, a repeated word as often as it
    stands in both. One division: equal scores are equal floats, and their group has no spread."""
    return _best(_f1, prediction, answers)


def exact_match(prediction: str | None, answers: Iterable[str]) -> float:
    """1 if the prediction equals a gold answer after normalisation, else 0."""
    return _best(operator.eq, prediction, answers)


def substring_match(prediction: str | None, answers: Iterable[str]) -> float:
    """1 if a gold answer stands anywhere in the prediction after normalisation, even in a word
    ("art" in "party"), else 0: to compare with the paper's figures, and never a training reward."""
    return _best(operator.contains, prediction, answers)


def _f1(prediction: str, gold: str) -> float:
    predicted, wanted = prediction.split(), gold.split()
    return 2 * (Counter(predicted) & Counter(wanted)).total() / (len(predicted) + len(wanted))


def _best(score: Callable, prediction: str | None, answers: Iterable[str]) -> float:
    """The best score over the gold answers; 0 where either side normalises to nothing."""
    answers = [answers] if isinstance(answers, str) else answers  # else it is read letter by letter
    predicted = normalize_answer(prediction or "")
    golds = [normalize_answer(answer) for answer in answers]
    return max((float(score(predicted, gold)) for gold in golds if predicted and gold), default=0.0)
