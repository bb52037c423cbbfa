"""Ranking engines: the best documents first, and noise where a request asks for it."""

import pytest

from minizs.engines.bm25 import BM25
from minizs.engines.ranking import NoDocuments, Ranking, holds_answer
from minizs.randomness import uniform
from minizs.trajectory import SearchRequest

DOCUMENTS = [
    "Ann was born in Rome",
    "Ann works for Acme",
    "Ann likes cats",
    "Ann owns a boat",
    "Bob was born in Oslo",
    "Bob works for Acme",
    "Bob likes dogs",
    "Rome lies in Italy",
    "Oslo lies in Norway",
    "Cid was born in Rome",
]


def ask(query, noisy=False, answers=("Rome",)):
    return SearchRequest(query, "where was Ann born?", answers, noisy)


def test_the_best_documents_come_first():
    """The best-ranked documents come first, at most top_k of them, in the order of the requests."""
    engine = BM25(DOCUMENTS, top_k=2)
    replies = engine.search([ask("where was ann BORN?"), ask("Oslo lies in")])
    assert [len(documents) for documents in replies] == [2, 2]
    assert replies[0][0] == DOCUMENTS[0] and replies[1][0] == DOCUMENTS[8]
    assert engine.search([]) == []
    assert len(BM25(DOCUMENTS[:2], top_k=5).search([ask("Ann")])[0]) == 2


@pytest.mark.parametrize("query", ["?", "zzz", "", "\n"])
def test_queries_of_no_known_word(query):
    """A query of no known word is answered like any other request."""
    assert len(BM25(DOCUMENTS, top_k=3).search([ask(query), ask("Ann")])) == 2


def test_noise_takes_the_useful_documents_out():
    """A noisy reply lacks the answer and holds the best of the rest; others stay as they are."""
    engine = BM25(DOCUMENTS, top_k=2)
    clean, noisy = engine.search([ask("Ann born in"), ask("Ann born in", noisy=True)])
    assert clean[0] == DOCUMENTS[0] and clean == engine.search([ask("Ann born in")])[0]
    assert len(noisy) == 2 and not any("Rome" in text for text in noisy)
    assert any("Ann" in text for text in noisy)  # still the best-ranked of the rest


def test_noise_goes_as_deep_as_it_takes():
    """Where the best documents are all useful, a noisy reply is found further down."""
    engine = BM25([f"Ann was born in Rome {i}" for i in range(30)] + ["Ann likes cats"], top_k=2)
    clean, noisy = engine.search([ask("Ann born in Rome"), ask("Ann born in Rome", noisy=True)])
    assert (len(clean), noisy) == (2, ["Ann likes cats"])


def test_the_share_of_noisy_requests_is_what_was_asked_for():
    """A reply is noisy where its request is marked so, and nowhere else."""
    engine = BM25(DOCUMENTS, top_k=2)
    p = 0.3
    requests = [ask("Ann born in", uniform(0, i) < p) for i in range(300)]
    spoiled = ["Ann was born in Rome" not in documents for documents in engine.search(requests)]
    assert spoiled == [request.noisy for request in requests]
    assert sum(spoiled) / 300 == pytest.approx(p, abs=0.08)


def test_holds_answer():
    """A document is useful if it contains any gold answer, whatever its capitals."""
    assert holds_answer("born in ROME", ask("q", answers=("Paris", "rome")))
    assert not holds_answer("born in Oslo", ask("q"))


def test_no_documents():
    """The engine that finds nothing gives one empty reply a request."""
    assert NoDocuments().search([ask("a"), ask("b")]) == [[], []]


class Shuffled(Ranking):
    """An engine that ranks at random: what an engine of one's own needs is in `rank`."""

    def rank(self, requests, n):
        rankings = []
        for request in requests:
            order = sorted(DOCUMENTS, key=lambda text: uniform(self.seed, *request.key, len(text)))
            rankings.append(order[:n])
        return rankings


def test_an_engine_can_draw_random_numbers():
    """`rank` sees each request's key and the seed: replies do not depend on who else searches."""
    requests = [SearchRequest("Ann", key=(7, i)) for i in range(8)]
    engine = Shuffled(3, len(DOCUMENTS), seed=1)
    together = engine.search(requests)
    assert together == [engine.search([request])[0] for request in requests]
    assert len({tuple(reply) for reply in together}) > 4
    assert together != Shuffled(3, len(DOCUMENTS), seed=2).search(requests)


@pytest.mark.parametrize(
    "answers, document, useful",
    [
        (("Rome",), "It is in ROME.", True),
        (("no",), "The north is cold; no, it is not.", False),  # a judgement is in no document
        (("yes", "Rome"), "yes, it is Rome", True),
        (("art",), "a party", False),  # whole words only
        (("The Beatles",), "by Beatles, a band", True),
        (("O’Brien",), "O'Brien wrote it", True),
        (("北京",), "它在北京市。", True),
        (("A",), "a cat", False),
        (("...",), "...", False),
        ((), "Rome", False),
    ],
)
def test_a_gold_answer_is_found_as_whole_words(answers, document, useful):
    """A document is useful if it holds a gold answer as the reward would read it."""
    assert holds_answer(document, SearchRequest("q", answers=answers)) == useful
