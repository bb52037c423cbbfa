"""The tiny world: names, facts, questions, judge."""

import pytest

from minizs.engines.bm25 import BM25
from minizs.trajectory import SearchRequest
from minizs.world.facts import RELATIONS, TWO_HOP, World, embedded, names, read_fact, read_question
from minizs.world.searchers import good_query, kinds_of_near_misses, read_query


@pytest.fixture(scope="module")
def world() -> World:
    return World(5)


def test_a_seed_is_a_world(world):
    """The same seed gives the same world, and another seed another one."""
    same, other = World(5), World(6)
    assert same.facts == world.facts and same.documents == world.documents
    assert same.questions() == world.questions()
    assert other.facts != world.facts


def test_names_of_the_test_are_never_trained_on():
    """People and companies of the test are pairs of known words that no training world with all
    words has."""
    train, test = World(1, "train", people=300), World(1, "test", people=300)
    for role in ("person", "company"):
        assert not set(train.members[role]) & set(test.members[role])
    words = {word for name in train.members["person"] for word in name.split()}
    assert len({w for n in test.members["person"] for w in n.split()} - words) < 5  # known words
    shared = embedded("train").facts.items() & embedded("test").facts.items()
    # Towns are in every world, each time in another country: one in thirty is the same by chance.
    assert {relation for (_, relation), _ in shared} <= {"lies_in"} and len(shared) < 12


def test_names_are_distinct():
    """No word plays two roles, so that a word tells its role."""
    pools = names()
    everything = [word for pool in pools.values() for word in pool]
    assert len(everything) == len(set(everything))


def test_answers_follow_from_the_facts(world):
    """One look-up for each hop of a question's path leads from its subject to its answer."""
    questions = world.questions()
    assert {q.kind for q in questions} == {"one_hop", "two_hop"}
    for question in questions:
        subject = question.path[0][0]
        assert subject in question.text and question.text.endswith("?")
        for step, relation in question.path:
            assert step == subject
            subject = world.facts[step, relation]
        assert subject == question.answer
    used = {tuple(r for _, r in q.path) for q in questions}
    assert used >= {(first, second) for first, second, _ in TWO_HOP}


def test_questions_are_unique(world):
    """The judge looks up a question by its text, so that no two questions share one."""
    texts = [q.text for q in world.questions()]
    assert len(texts) == len(set(texts))


def test_two_hops_end_where_they_should():
    """The second relation of a chain is one that the first one's object has."""
    for first, second, text in TWO_HOP:
        assert RELATIONS[first].object == RELATIONS[second].subject and "{s}" in text


@pytest.mark.parametrize("name", list(RELATIONS))
def test_read_fact_inverts_every_wording(name):
    """What a wording states is read back, for names of one word and of several."""
    for wording in RELATIONS[name].wordings:
        for subject, obj in (("Ann Bee", "Rome"), ("Rome", "3 May 1950"), ("Acme Inc", "Ann Bee")):
            assert read_fact(wording.format(s=subject, o=obj)) == (subject, name, obj)


def test_garbled_documents_state_nothing():
    """A sentence that is no wording of this world states no fact."""
    for text in ("", "Rome", "Ann was born", "was born in Rome", "Ann born in Rome"):
        assert read_fact(text) is None


def test_every_fact_has_a_document_that_states_it(world):
    """The documents state all facts, and nothing else."""
    assert {read_fact(text) for text in world.documents} == {
        (s, r, o) for (s, r), o in world.facts.items()
    }


def test_the_judge_is_exact(world):
    """A document is useful if it states the fact that the query is about and the question needs:
    not a neighbour's, not another fact's, not that of an earlier hop."""
    question = next(q for q in world.questions() if [r for _, r in q.path][1:] == ["based_in"])
    (person, _), (company, _) = question.path
    first, second = RELATIONS["works_for"], RELATIONS["based_in"]
    query = second.query.format(s=company)
    right = second.wordings[1].format(s=company, o=question.answer)
    earlier = first.wordings[0].format(s=person, o=company)
    request = SearchRequest(query, question.text)
    assert world.judge(right, request)
    assert world.judge(earlier, SearchRequest(first.query.format(s=person), question.text))
    for useless in (
        earlier,  # of no use to a query for the second hop
        second.wordings[0].format(s="Nobody Press", o=question.answer),  # another's
        RELATIONS["founded_by"].wordings[0].format(s=company, o=question.answer),  # another fact
        f"{company} {question.answer}",  # no sentence of this world
    ):
        assert not world.judge(useless, request)
    assert not world.judge(right, SearchRequest(query, "another question?"))


def test_bm25_finds_what_a_good_query_is_after(world):
    """Three documents of BM25 hold what a good query asks for in at least 95 % of all steps."""
    engine = BM25(world.documents, 3)
    answers = [
        SearchRequest(RELATIONS[r].query.format(s=s), q.text, (q.answer,))
        for q in world.questions()[:400]
        for s, r in q.path
    ]
    hits = [
        any(world.judge(text, request) for text in documents)
        for request, documents in zip(answers, engine.search(answers), strict=True)
    ]
    assert sum(hits) >= 0.95 * len(hits)


def test_noisy_bm25_never_holds_what_is_needed(world):
    """The world's judge takes the useful documents out of a noisy reply."""
    engine = BM25(world.documents, 3, world.judge)
    for q in world.questions()[:50]:
        s, r = q.path[0]
        request = SearchRequest(RELATIONS[r].query.format(s=s), q.text, (q.answer,), noisy=True)
        documents = engine.search([request])[0]
        assert documents and not any(world.judge(text, request) for text in documents)


def test_a_question_tells_what_to_look_up():
    """Every question is read back: its subject, and the relations to look up in turn. Other texts
    are no questions of a tiny world."""
    for question in embedded("train").questions():
        subject, relations = read_question(question.text)
        assert subject == question.path[0][0]
        assert relations == [relation for _, relation in question.path]
    for text in ("", "who wrote it?", "Tatco Mining was founded by Anna Berg"):
        assert read_question(text) is None


def test_few_words_make_kinds_of_near_misses():
    """With few words for names, most people share a word with somebody; a word is no name."""
    few, many = World(5, words=16), World(5)
    for world, share in ((few, 0.95), (many, 0.9)):
        people = [name.split() for name in world.members["person"]]
        sharing = [one for one in people for other in people if one != other and one[0] == other[0]]
        assert (len({tuple(name) for name in sharing}) > share * len(people)) == (world is few)
    assert len({name.split()[0] for name in few.members["person"]}) <= 16


def test_a_good_query_is_read_back():
    """What a good query asks for is known from its words; another one asks for nothing exactly."""
    for (subject, relation), _ in [*World(5).facts.items()][::7]:
        assert read_query(good_query(subject, relation)) == (subject, relation)
    for query in ("", "Ann Bee", "born in", "when was Ann Bee born"):
        assert read_query(query) is None


def test_near_misses():
    """Half of a name with the same relation, or another fact about the same subject, is one; the
    fact itself, or somebody else altogether, is none."""
    query = good_query("Ann Bee", "born_in")
    kinds = {
        "Ann Bee was born in Rome": set(),
        "Cid Dee was born in Rome": set(),
        "no fact": set(),
        "Ann Bee was born on 3 May 1950": {"other_fact"},
        "Ann Dee was born in Rome": {"half_name"},
        "records show Cid Bee was born in Rome": {"half_name"},
        "Ann Dee was born on 3 May 1950": set(),
    }
    for document, expected in kinds.items():
        assert kinds_of_near_misses(query, [document]) == expected
    assert kinds_of_near_misses(query, [*kinds]) == {"other_fact", "half_name"}
    assert kinds_of_near_misses("Ann Bee", [*kinds]) == set()
