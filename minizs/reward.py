"""The reward: how well an answer matches the gold answers, as a number in [0, 1].

Training uses F1 (paper §3.5); evaluation reports F1, exact match and substring match, each under
its own name. Why F1: it gives part of the reward for a partly right answer, so that the samples of
one question differ more often, and its precision makes every extra word cost something. The paper
reports that its "EM" led to very long answers; that measure was in fact the substring match below.

How this differs from the paper's code:
- Its EM asks whether the gold answer is contained in the prediction, so that naming many candidates
  scores 1. Here exact match is equality, and the substring match says what it is.
- It looks for the answer in the prompt and the documents as well as in what the policy wrote, so
  that a rollout without an answer is scored on the example in the prompt. Here the caller passes
  what the policy itself answered, or None, and None scores 0.
- A gold answer that normalises to nothing ("The") is contained in everything. Here it scores 0.

Left out: a reward for the format (the paper found none to be needed), and any judge model.
"""

import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """SQuAD v1.1 normalisation: lower case, no ASCII punctuation, no a/an/the, single spaces."""
    text = text.lower().translate(PUNCTUATION)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def f1_score(prediction: str | None, answers: Iterable[str]) -> float:
    """Word-overlap F1 = 2 IN / (PN + RN) with the best-matching gold answer (paper §3.5).

    PN and RN are the numbers of words in prediction and gold after normalisation, IN the number
    they share, a repeated word counting as often as it stands in both. This is 2PR / (P + R) in one
    division, so that equal scores are equal floats and a group of them has no spread.
    """
    return _best(_f1, prediction, answers)


def exact_match(prediction: str | None, answers: Iterable[str]) -> float:
    """1 if the prediction equals a gold answer after normalisation, else 0."""
    return _best(operator.eq, prediction, answers)


def substring_match(prediction: str | None, answers: Iterable[str]) -> float:
    """1 if a gold answer stands anywhere in the prediction after normalisation, else 0.

    What the paper's code reports as EM. It compares characters, not words ("art" is in "party"),
    and rewards long answers, so it is for comparison only and never a training reward.
    """
    return _best(operator.contains, prediction, answers)


def _f1(prediction: str, gold: str) -> float:
    predicted_words, gold_words = prediction.split(), gold.split()
    shared = (Counter(predicted_words) & Counter(gold_words)).total()
    return 2 * shared / (len(predicted_words) + len(gold_words))


def _best(score: Callable[[str, str], float], prediction: str | None,
          answers: Iterable[str]) -> float:  # fmt: skip
    """The best score over the gold answers; 0 where either side normalises to nothing."""
    if isinstance(answers, str):  # a lone gold answer would be read letter by letter
        answers = [answers]
    predicted = normalize_answer(prediction or "")
    golds = [normalize_answer(answer) for answer in answers]
    return max((float(score(predicted, gold)) for gold in golds if predicted and gold), default=0.0)
