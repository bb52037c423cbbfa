"""Whether a policy believes or doubts replies that do not help, told from its trajectories."""

import pytest

from minizs.engines.bm25 import BM25
from minizs.runs.near_misses import likely_names, near_misses
from minizs.trajectory import SearchRequest
from minizs.world.facts import World
from minizs.world.searchers import good_query

BOTH = "when was the founder of Tatco Mining born?"
FOUNDER = "Tatco Mining was founded by Anna Berg"
OTHER_FOUNDER = "Tatco Timber was founded by Carl Dorn"
BIRTHDAY = "Anna Berg was born on 6 June 1916"
OTHER_BIRTHDAY = "Anna Dorn , born on 9 May 1920 at home"


def row(question: str, *turns: tuple, source: str = "two_hop", noisy: bool = True) -> dict:
    """A row of a log. A turn is a query and the documents that it brought, or an answer alone."""
    rows = []
    for content, *documents in turns:
        is_search = bool(documents)
        action = "search" if is_search else "answer"
        text = documents if is_search else None
        rows.append({"action": action, "content": content, "documents": text, "noisy": noisy})
    example = {"question": question, "answers": ["6 June 1916"], "source": source}
    return {"example": example, "turns": rows}


WORLD = [
    # Neither reply is a near miss: each states the fact that the query asks for.
    ([("Tatco Mining founded by", FOUNDER), ("Anna Berg born on", BIRTHDAY), ("6 June 1916",)], {}),
    # It goes on with another company's founder, and answers with that person's birthday.
    (
        [
            ("Tatco Mining founded by", OTHER_FOUNDER),
            ("Carl Dorn born on", "Carl Dorn was born on 1 May 1901"),
            ("1 May 1901",),
        ],
        {0: "believed", 1: "believed"},
    ),
    # It asks the same once more, or words it in another way.
    (
        [("Tatco Mining founded by", OTHER_FOUNDER), ("Tatco Mining founded by", FOUNDER)],
        {0: "doubted"},
    ),
    ([("Tatco Mining", OTHER_FOUNDER), ("who founded Tatco Mining", FOUNDER)], {0: "doubted"}),
    # The second reply repeats the first fact, which the query does not ask for any more.
    (
        [
            ("Tatco Mining founded by", FOUNDER),
            ("Anna Berg born on", FOUNDER, OTHER_BIRTHDAY),
            ("9 May 1920",),
        ],
        {1: "believed"},
    ),
    # An answer from memory says nothing about the documents, and neither does an end.
    ([("Tatco Mining founded by", OTHER_FOUNDER), ("7 July 1917",)], {0: ""}),
    ([("Tatco Mining founded by", OTHER_FOUNDER)], {0: ""}),
    # What an earlier, useful reply has said is not taken from the later one.
    (
        [
            ("Tatco Mining founded by", FOUNDER),
            ("Anna Berg born on", BIRTHDAY),
            ("Anna Berg", "Ella Fink was born on 6 June 1916"),
            ("6 June 1916",),
        ],
        {2: ""},
    ),
    # A wrong object of the right fact: no reader could doubt it, so that it is no near miss.
    (
        [
            ("Tatco Mining founded by", "Tatco Mining was founded by Ella Fink"),
            ("Ella Fink born on", "Ella Fink was born on 6 June 1916"),
            ("6 June 1916",),
        ],
        {},
    ),
]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("turns, expected", WORLD)
def test_the_tiny_world(turns, expected, noisy):
    """What helps is told by the facts alone, whether noise was asked for or not."""
    assert near_misses(row(BOTH, *turns, noisy=noisy)) == expected


def test_it_agrees_with_the_judge_of_the_world():
    """Where all replies are useful none is a near miss, and where the last one is noisy it is."""
    world = World(3)
    engine = BM25(world.documents, judge=world.judge)

    def look_up(question, hop: int, noisy: bool) -> tuple[str, ...]:
        query = good_query(*question.path[hop])
        request = SearchRequest(query, question.text, (question.answer,), noisy)
        return query, *engine.search([request])[0]

    for question in world.questions()[:300]:
        useful = [look_up(question, hop, noisy=False) for hop in range(len(question.path))]
        for length in range(1, len(useful) + 1):
            noisy = look_up(question, length - 1, noisy=True)
            for last, expected in ((useful[length - 1], set()), (noisy, {length - 1})):
                one = row(question.text, *useful[: length - 1], last, source=question.kind)
                one["example"]["answers"] = [question.answer]
                assert set(near_misses(one)) == expected, one


OTHERS = [
    ("Paris", ["Lyon lies on the Rhone"], True, ("Lyon",), "believed"),
    ("Paris", ["Lyon lies on the Rhone"], True, ("what lies on the Rhone", "x"), "believed"),
    ("Paris", ["Lyon lies on the river"], True, ("capital on the river", "x"), "doubted"),
    ("Paris", ["It took three years in all"], True, ("three years",), "believed"),
    ("Paris", ["It took three years in all"], True, ("no",), ""),
    ("Paris", ["Not Paris but Lyon"], True, ("Lyon",), None),  # a gold answer stands in it
    ("Paris", ["Lyon lies on the Rhone"], False, ("Lyon",), None),  # nobody asked for noise
    ("Paris", [], True, ("capital", "x"), None),  # nothing to believe
    ("巴黎", ["里昂在罗讷河畔"], True, ("里昂",), "believed"),
]


@pytest.mark.parametrize("gold, documents, noisy, following, expected", OTHERS)
def test_other_data(gold, documents, noisy, following, expected):
    """On other data, asking for noise and the absence of gold answers tell a near miss."""
    one = row("what is the capital?", ("capital", "x"), following, source="nq", noisy=noisy)
    one["turns"][0]["documents"] = documents
    one["example"]["answers"] = [gold]
    outcomes = near_misses(one)
    outcomes.pop(1, None)
    assert outcomes == ({} if expected is None else {0: expected})


def test_names():
    """Words that stand in lower case as well are none, and what has no case is one."""
    assert likely_names(["The town is Lyon, the 2 of France"]) == {"lyon", "2", "france"}
    assert likely_names(["里昂"]) == {"里", "昂"}
