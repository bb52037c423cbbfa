"""Scripted searchers of the tiny world: what they ask, and what a simulator should learn of it.

Stage 1 needs examples of searches before any policy can search. In the tiny world a script writes
the queries, good ones and sloppy ones, and knows exactly which documents are of use.
"""

from random import Random

from minizs.trajectory import SearchRequest
from minizs.world.facts import RELATIONS, Question, World, read_fact


def good_query(subject: str, relation: str) -> str:
    """What a good searcher types to look up one fact."""
    return RELATIONS[relation].query.format(s=subject)


def sloppy_query(world: World, goal: tuple[str, str], question: Question, rng: Random) -> str:
    """One of four ways to miss the fact `goal`, a (subject, relation) pair: to type the question,
    half a name, the same relation of something else, or another relation of the same thing."""
    subject, relation = goal
    kind = RELATIONS[relation].subject
    same_kind = [other.query for other in RELATIONS.values() if other.subject == kind]
    of_another = good_query(world.draw(kind, rng), relation)
    return rng.choice(
        [
            question.text.removesuffix("?"),
            subject.split()[0],
            of_another,
            rng.choice(same_kind).format(s=subject),
        ]
    )


def write_query(
    world: World, goal: tuple[str, str], question: Question, sloppy: bool, rng: Random
) -> str:
    """A query for the fact `goal`, a (subject, relation) pair on the question's path."""
    if sloppy:
        return sloppy_query(world, goal, question, rng)
    return good_query(*goal)


def write_requests(
    world: World, questions: list[Question], good: float, rng: Random
) -> dict[SearchRequest, str]:
    """A request for each question, with the hop that it is about: "first", or "final" where its
    answer is the question's. Equal requests are one.

    A share `good` of the queries is good. Half of the requests, at random, ask the engine for noisy
    documents, which are the best-ranked ones that are of no use: near misses.
    """
    hops = {}
    for question in questions:
        step = rng.randrange(len(question.path))
        sloppy = rng.random() > good
        query = write_query(world, question.path[step], question, sloppy, rng)
        noisy = rng.random() < 0.5
        request = SearchRequest(query, question.text, (question.answer,), noisy)
        hops[request] = "final" if step == len(question.path) - 1 else "first"
    return hops


def states_what_was_asked(query: str, documents: list[str]) -> bool:
    """Whether a document states the fact (subject and relation) that a good query asks for."""
    for document in documents:
        fact = read_fact(document)
        if fact and good_query(fact.subject, fact.relation) == query:
            return True
    return False
