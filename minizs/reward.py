"""The reward: how well an answer matches the gold answers, a number in [0, 1].

Training uses F1 (paper section 3.5). A partly right answer then gets its part, so that the samples
of a question differ more often, and every superfluous word costs precision.

The paper's code differs in three ways that are mistakes here. Its "EM" asks whether the prediction
contains a gold answer, so that naming many candidates scores 1. A rollout without an answer is
scored on the example in its prompt; here it scores 0. A gold answer that normalises to nothing is
contained in every prediction; here it scores 0.

Left out: a reward for the format, which the paper did not need, and a reward model.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable

# Answers that are judgements. They are compared whole, as in HotpotQA's official script, and no
# document can be said to contain them.
JUDGEMENTS = frozenset({"yes", "no", "noanswer"})
ARTICLE = re.compile("\\b(a|an|the)\\b(?![\u0300-\u036f])")  # "a" with a loose accent is none
# Signs that stand for one of ASCII's. Some of the apostrophes are letters by their Unicode class.
SIGNS = {
    "'": "\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u2018\u2019\u201b\u2032\ua78c",
    '"': "\u201c\u201d\u201f\u2033",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212",
    "/": "\u2044\u2215",
}
FRACTION = re.compile("([¼-¾⅐-⅟↉])")  # 5½ is 5 1/2, and not 51/2
# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer; kana and ideographs.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
CHARACTER = re.compile(f"([{UNSPACED}])")


class _Folded(dict):
    """For `str.translate`: one spelling of `SIGNS`, and nothing that is invisible. A character is
    looked up in Unicode's tables when it is first met."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code)) == "Cf" else code
        return self[code]


class _WithoutPunctuation(dict):
    """For `str.translate`: removes punctuation, in the same way. ASCII's symbols ($, +, <, ^ …) are
    punctuation in the official script, and so they are here."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        is_punctuation = unicodedata.category(character)[0] == "P"
        self[code] = None if character in string.punctuation or is_punctuation else code
        return self[code]


_FOLDED = _Folded({ord(sign): plain for plain, signs in SIGNS.items() for sign in signs})
# Selectors of a character's variant, such as an emoji's, are marks by their Unicode class.
_FOLDED.update(dict.fromkeys([0x034F, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
_PUNCTUATION = _WithoutPunctuation()


def fold(text: str) -> str:
    """The text in one spelling: Unicode's compatible form (NFKC), in lower case, with ASCII's signs
    for those that stand for them, and with spaces around each character of a script that has none
    between its words. ASCII text is only lowered.

    BM25 (engines/bm25.py) splits documents and queries on it as well.
    """
    if text.isascii():
        return text.lower()
    text = text.replace("\u00b4", "'")  # NFKC would make a space and a loose accent of it
    text = FRACTION.sub(r" \1", text)
    text = unicodedata.normalize("NFKC", text).casefold()
    text = text.replace("i\u0307", "i")  # what becomes of the Turkish İ
    text = unicodedata.normalize("NFKC", text).translate(_FOLDED)
    return CHARACTER.sub(r" \1 ", text)


def words(text: str) -> list[str]:
    """The words that count in a comparison: folded, without punctuation, a, an and the.

    An answer that is nothing but an article keeps it: "A" may be the right one of four choices.
    """
    text = fold(text).translate(_PUNCTUATION)
    without_articles = ARTICLE.sub(" ", text).split()
    if without_articles:
        return without_articles
    words_with_articles = text.split()
    return words_with_articles if len(words_with_articles) == 1 else []


def normalize_answer(text: str) -> str:
    """The words of an answer with single spaces between them. For ASCII text this is what the
    official script of SQuAD 1.1 gives, but for an answer that is a lone article."""
    return " ".join(words(text))


def f1_score(prediction: str | None, answers: Iterable[str]) -> float:
    """F1 = 2 IN / (PN + RN) with the best-matching gold answer (paper section 3.5).

    PN and RN are the numbers of words in prediction and gold answer. IN is the number of shared
    ones, where a repeated word counts as often as it stands in both. There is one division only, so
    that equal scores are equal floats, and a group of them has no spread.
    """
    return _best(_f1, prediction, answers)


def exact_match(prediction: str | None, answers: Iterable[str]) -> float:
    """1 if the prediction equals a gold answer after normalisation, else 0."""
    return _best(_equal, prediction, answers)


def substring_match(prediction: str | None, answers: Iterable[str]) -> float:
    """1 if a gold answer stands anywhere in the prediction after normalisation, else 0.

    It may be part of a word ("art" in "party"). This is for comparison with the paper's figures and
    never a reward in training.
    """
    return _best(_contains, prediction, answers)


def _f1(prediction: str, gold: str) -> float:
    predicted_words = prediction.split()
    gold_words = gold.split()
    shared = Counter(predicted_words) & Counter(gold_words)
    return 2 * shared.total() / (len(predicted_words) + len(gold_words))


def _equal(prediction: str, gold: str) -> float:
    return float(prediction == gold)


def _contains(prediction: str, gold: str) -> float:
    return float(gold in prediction)


def _best(
    score: Callable[[str, str], float], prediction: str | None, answers: Iterable[str]
) -> float:
    """The best score over all gold answers, both sides normalised. It is 0 where either side
    normalises to nothing. A gold answer of `JUDGEMENTS` is matched whole or not at all."""
    if isinstance(answers, str):
        answers = [answers]  # it would be read letter by letter
    predicted = normalize_answer(prediction or "")
    best = 0.0
    for answer in answers:
        gold = normalize_answer(answer)
        if not predicted or not gold:
            continue
        compare = _equal if gold in JUDGEMENTS else score
        best = max(best, compare(predicted, gold))
    return best
