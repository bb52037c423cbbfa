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


def read_query(query: str) -> tuple[str, str] | None:
    """The (subject, relation) that a good query asks for; None for another query."""
    for name, relation in RELATIONS.items():
        before, after = relation.query.split("{s}")
        if query.startswith(before) and query.endswith(after):
            subject = query[len(before) : len(query) - len(after)]
            if subject:
                return subject, name
    return None


def states_what_was_asked(query: str, documents: list[str]) -> bool:
    """Whether a document states the fact (subject and relation) that a good query asks for."""
    goal = read_query(query)
    facts = [fact for fact in map(read_fact, documents) if fact]
    return any((fact.subject, fact.relation) == goal for fact in facts)


def kinds_of_near_misses(query: str, documents: list[str]) -> set[str]:
    """The near misses among documents that a good query brought: "half_name" is the relation that
    it asks for, of another subject that has a word of the name; "other_fact" is another relation of
    the same subject."""
    goal = read_query(query)
    kinds = set()
    for fact in filter(None, map(read_fact, documents)):
        if goal is None or (fact.subject, fact.relation) == goal:
            continue
        subject, relation = goal
        if fact.subject == subject:
            kinds.add("other_fact")
        elif fact.relation == relation and not set(fact.subject.split()).isdisjoint(
            subject.split()
        ):
            kinds.add("half_name")
    return kinds
