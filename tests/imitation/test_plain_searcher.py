"""The searcher without a model: what it asks, when it answers, and what it never answers."""

import pytest

from minizs.engines.bm25 import BM25
from minizs.engines.ranking import NoDocuments
from minizs.imitation import plain_searcher
from minizs.imitation.plain_searcher import search_plainly
from minizs.protocol import parse_action
from minizs.trajectory import Example

CORPUS = [
    '"Blue Harbour" Blue Harbour is a 1986 film. It was directed by Ida Stone in Oslo.',
    '"Ida Stone" Ida Stone, a Danish director, was born in Aarhus in 1950.',
    '"Red Harbour" Red Harbour is a bay. In July it is full of boats.',
    '"Boats" Boats are built of wood, and often painted blue.',
]
ONE_HOP = Example("Who directed the film Blue Harbour?", ("Ida Stone",))
TWO_HOP = Example("Where was the director of the film Blue Harbour born?", ("Aarhus", "Århus"))


def bm25(top_k: int = 1) -> BM25:
    return BM25(CORPUS, top_k)


def test_it_asks_the_question_and_answers_with_what_it_read():
    """One search is enough where a document of the question holds the gold answer."""
    [row] = search_plainly([ONE_HOP], bm25(), max_searches=3)
    search, answer = row.turns
    assert search.content == "Who directed the film Blue Harbour"
    assert search.documents == CORPUS[:1]
    assert (row.answer, row.reward, row.searches) == ("Ida Stone", 1.0, 1)
    assert answer.text == (
        "<think> It was directed by Ida Stone in Oslo. </think> <answer> Ida Stone </answer>"
    )


def test_a_second_hop_is_asked_with_a_name_that_was_read():
    """Where the documents do not hold the answer, a name from them takes the place of the words
    that its sentence explains."""
    [row] = search_plainly([TWO_HOP], bm25(), max_searches=3)
    queries = [turn.content for turn in row.turns if turn.action == "search"]
    assert queries == ["Where was the director of the film Blue Harbour born", queries[1]]
    assert queries[1].startswith("Ida Stone") and "born" in queries[1]
    assert row.answer == "Aarhus" and row.reward == 1.0


def test_a_turn_reads_as_what_it_says_it_is():
    """The text of each turn parses to its action and its content."""
    for row in search_plainly([ONE_HOP, TWO_HOP], bm25(), max_searches=3):
        for turn in row.turns:
            action = parse_action(turn.text)
            assert (action.kind, action.content) == (turn.action, turn.content)


def test_no_query_is_asked_twice_and_their_number_is_limited():
    """Without an answer it gives up after `max_searches`, or when it has no other idea."""
    nowhere = Example("Who painted the film Blue Harbour?", ("nobody at all",))
    for limit in (1, 2, 5):
        [row] = search_plainly([nowhere], bm25(top_k=3), max_searches=limit)
        queries = [turn.content for turn in row.turns]
        assert len(set(queries)) == len(queries) <= limit
        assert row.answer is None and row.reward == 0
    [row] = search_plainly([nowhere], NoDocuments(), max_searches=9)
    assert [turn.content for turn in row.turns] == [
        "Who painted the film Blue Harbour",
        "painted film Blue Harbour",
    ]


def test_after_a_noisy_reply_it_searches_again():
    """Noisy requests are those that the engine gets, they hold no answer, and the next search is
    another one."""
    examples = [ONE_HOP] * 40
    rows = search_plainly(examples, bm25(), max_searches=4, noise=0.5)
    noisy = [turn for row in rows for turn in row.turns if turn.noisy]
    assert 10 < len(noisy) < 80
    assert all("Ida Stone" not in " ".join(turn.documents) for turn in noisy)
    for row in rows:
        if row.turns[0].noisy:
            assert row.turns[1].action == "search"
            assert row.turns[1].content != row.turns[0].content
        else:
            assert row.turns[1].action == "answer"


def test_its_random_numbers_depend_on_keys_alone():
    """A question is played in the same way alone and among others, and otherwise with another
    seed."""
    examples = [ONE_HOP, TWO_HOP] * 8
    together = search_plainly(examples, bm25(), max_searches=4, noise=0.5)
    alone = [
        search_plainly([example], bm25(), max_searches=4, noise=0.5, keys=[(place,)])[0]
        for place, example in enumerate(examples)
    ]
    other = search_plainly(examples, bm25(), max_searches=4, noise=0.5, seed=1)
    assert together == alone != other


@pytest.mark.parametrize(
    "answer, text, stated",
    [
        ("Rome", "It is in Rome.", True),
        ("Rome", "It is in Romeo.", False),
        ("the River Po", "River Po!", True),
        ("1,986", "a 1986 film", True),
        ("no", "There is no such film.", False),
        ("yes", "yes", False),
        ("", "text", False),
    ],
)
def test_an_answer_is_stated_as_whole_words(answer, text, stated):
    """Case, articles and punctuation do not matter; a judgement such as "no" is never stated."""
    assert plain_searcher.is_stated(answer, text) == stated


@pytest.mark.parametrize(
    "sentence, names",
    [
        ("The University of Oslo lies in Norway.", ["University of Oslo", "Norway"]),
        ("Boats are blue.", []),
        ('He met Ida Stone, Bo Lund and "Red Harbour" in July.', ["Ida Stone", "Bo Lund"]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_names_are_runs_of_capitalised_words(sentence, names):
    """The first word of a sentence alone is no name, nor is a month; a comma ends a name."""
    assert plain_searcher.capitalised_names(sentence)[: len(names)] == names
    if not names:
        assert plain_searcher.capitalised_names(sentence) == []


def test_an_excerpt_holds_the_answer():
    """A long sentence is noted from the place where the answer fits in."""
    sentence = " ".join(["word"] * 50 + ["Rome"] + ["word"] * 50)
    part = plain_searcher.excerpt(sentence, "Rome")
    assert "Rome" in part and len(part.split()) == plain_searcher.THOUGHT_WORDS
    assert plain_searcher.excerpt("It is Rome.", "Rome") == "It is Rome."
