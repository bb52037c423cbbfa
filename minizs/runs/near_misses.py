"""Near misses: replies without a fact that helps, and what the policy did next.

Noise is there to teach a policy to doubt what it reads. Whether it does can be seen where a reply
helps with nothing. In the tiny world that is known exactly: no document states a fact on the way
from the question to its answer. Of other data it is known of replies that were asked to be noisy,
and only as far as gold answers tell: none of their documents holds one.

The policy has *believed* such a reply if its next turn answers with something from these documents,
or searches for a name from them. What was in the question, in an earlier query or in an earlier
reply that helps does not count as theirs. It has *doubted* the reply if it searches again without
such a name. Of all else, an answer from memory for instance, neither is said.

The functions read rows of trajectories.jsonl and of an evaluation's .jsonl.
"""

import re

from minizs.engines.ranking import holds_answer
from minizs.reward import fold
from minizs.trajectory import SearchRequest
from minizs.world.facts import read_fact, read_question

BELIEVED = "believed"
DOUBTED = "doubted"
WORD = re.compile(r"\w+")


def near_misses(row: dict) -> dict[int, str]:
    """`BELIEVED`, `DOUBTED` or "" for each turn of a trajectory that brought a near miss, by the
    turn's number, counted from 0."""
    useful = useful_turns(row)
    outcomes = {}
    for number, turn in enumerate(row["turns"]):
        if turn["documents"] and number not in useful:
            outcomes[number] = reaction(row, number, useful)
    return outcomes


# ---- Whether documents help ----------------------------------------------------------------------


def useful_turns(row: dict) -> set[int]:
    """The numbers of the turns whose documents may hold something that helps."""
    path = None
    if row["example"]["source"] in ("one_hop", "two_hop"):
        path = read_question(row["example"]["question"])
    if path:
        return useful_turns_of_the_world(row, *path)
    return {
        number
        for number, turn in enumerate(row["turns"])
        if turn["documents"] and not (turn["noisy"] and lacks_golds(turn, row["example"]))
    }


def useful_turns_of_the_world(row: dict, subject: str, relations: list[str]) -> set[int]:
    """The numbers of the turns with a document that takes the search further.

    It states a fact to look up that no document has stated before, or that the query asks for. The
    second fact to look up is about the first one's object, whichever object the documents name: a
    simulator may name a wrong one, and no reader could doubt it. For the same reason it helps if
    the fact that the query asks for has the gold answer for its object.
    """
    goals = {(subject, relations[0])}
    stated = set()
    useful = set()
    for number, turn in enumerate(row["turns"]):
        query = set(turn["content"].split())
        for fact in filter(None, map(read_fact, turn["documents"] or [])):
            name = set(fact.subject.split())
            is_goal = (fact.subject, fact.relation) in goals
            is_new = fact not in stated
            is_gold = fact.relation == relations[-1] and fact.object in row["example"]["answers"]
            # For a goal half of the name is enough, as for the world's judge.
            if is_goal and (is_new or not name.isdisjoint(query)):
                useful.add(number)
            if is_gold and name <= query:
                useful.add(number)
            if is_goal and fact.relation == relations[0]:
                goals |= {(fact.object, relation) for relation in relations[1:]}
            stated.add(fact)
    return useful


def lacks_golds(turn: dict, example: dict) -> bool:
    """Whether no document of a turn holds a gold answer."""
    return not holds_any(turn["documents"], example["answers"])


def holds_any(documents: list[str], answers: list[str]) -> bool:
    request = SearchRequest("", answers=tuple(answers))
    return any(holds_answer(document, request) for document in documents)


# ---- What the policy did -------------------------------------------------------------------------


def reaction(row: dict, number: int, useful: set[int]) -> str:
    """Whether the turn after this one believes or doubts this one's documents; "" for neither."""
    turns = row["turns"]
    if number + 1 == len(turns):
        return ""
    following = turns[number + 1]
    known = [row["example"]["question"]]
    known += [turn["content"] for turn in turns[: number + 1]]
    if following["action"] == "search":
        is_taken = takes_a_name(following["content"], turns[number]["documents"], known)
        return BELIEVED if is_taken else DOUBTED
    if following["action"] == "answer":
        for place in useful & set(range(number)):
            known += turns[place]["documents"]
        is_taken = takes_an_answer(following["content"], turns[number]["documents"], known)
        return BELIEVED if is_taken else ""
    return ""


def takes_a_name(text: str, documents: list[str], known: list[str]) -> bool:
    """Whether a text has a name that stands in these documents and nowhere in what was known."""
    new_names = likely_names(documents) - words_in(" ".join(known))
    return not new_names.isdisjoint(words_in(text))


def takes_an_answer(answer: str, documents: list[str], known: list[str]) -> bool:
    """The same of an answer, which can also be a phrase without any name."""
    is_a_phrase = holds_any(documents, [answer]) and not holds_any(known, [answer])
    return is_a_phrase or takes_a_name(answer, documents, known)


def likely_names(documents: list[str]) -> set[str]:
    """The words that never stand in lower case in these documents: names and numbers, mostly. In a
    script without upper case that is every word."""
    text = " ".join(documents)
    in_lower_case = [word for word in WORD.findall(text) if word.islower()]
    return words_in(text) - words_in(" ".join(in_lower_case))


def words_in(text: str) -> set[str]:
    return set(WORD.findall(fold(text)))
