"""Retrievers on other machines, in each protocol, against servers on loopback."""

import pytest
from servers import serving
from test_ranking import DOCUMENTS, ask

from minizs.engines.bm25 import BM25
from minizs.engines.client import Client, ServiceError
from minizs.engines.http import AT_ONCE, HttpSearch

SCORED, PLAIN, WIKI = "scored", "plain", "wiki"


def retriever(shape, documents=DOCUMENTS):
    """A retriever's answers as `serving` wants them, written out here in the published shapes."""
    engine = BM25(documents)

    def answer(path, body, headers):
        assert path == "/retrieve"
        if shape == WIKI:
            [ranked] = engine.rank([ask(body["query"])], body["top_k"])
            return 200, [{"title": "", "text": text, "score": 0.5} for text in ranked]
        rows = engine.rank([ask(query) for query in body["queries"]], body["topk"])
        if shape == PLAIN:
            return 200, [[{"id": "7", "contents": text} for text in row] for row in rows]
        assert body["return_scores"] is True
        return 200, {
            "result": [
                [{"document": {"id": "7", "contents": text}, "score": 1.5} for text in row]
                for row in rows
            ]
        }

    return answer


@pytest.mark.parametrize("shape", [SCORED, PLAIN, WIKI])
def test_a_retrievers_documents_are_those_of_the_engine_behind_it(shape):
    """Through each protocol, clean and noisy replies are those of the engine behind the server."""
    requests = [
        ask(f"{query} {i}", noisy)
        for query in ("Ann born in", "Oslo lies", "Acme works")
        for noisy in (False, True)
        for i in range(14)
    ]
    with serving(retriever(shape)) as (url, seen):
        engine = HttpSearch(Client(url, retries=0), top_k=2, wiki=shape == WIKI)
        assert engine.search(requests) == BM25(DOCUMENTS, 2).search(requests)
        assert engine.search([]) == []
        assert engine.search(requests[:1]) == BM25(DOCUMENTS, 2).search(requests[:1])
    assert len(requests) > AT_ONCE  # in more than one part
    assert shape == WIKI or max(len(body["queries"]) for _, body in seen) == AT_ONCE


def test_noise_from_a_retriever_is_bounded():
    """Where every document holds the answer, 16 times top_k documents are asked for at most."""
    documents = [f"Ann was born in Rome {i}" for i in range(99)]
    with serving(retriever(SCORED, documents)) as (url, seen):
        engine = HttpSearch(Client(url, retries=0), top_k=2)
        assert engine.search([ask("Ann born", noisy=True)]) == [[]]
    assert [body["topk"] for _, body in seen] == [2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    "document, text",
    [
        ({"contents": '"Ann"\nborn\n in Rome\n'}, '"Ann" born in Rome'),
        ({"title": "Ann", "text": "born\nin Rome"}, '"Ann" born in Rome'),
        ({"title": "", "text": "born"}, "born"),
        ({"document": {"title": None, "text": "born"}, "score": 1}, "born"),
    ],
)
def test_a_document_is_its_title_and_text_on_a_line(document, text):
    """Title and text stand on one line: a line break would look like another document."""
    for answer, wiki in (({"result": [[document]]}, 0), ([[document]], 0), ([document], 1)):
        with serving(lambda *_, answer=answer: (200, answer)) as (url, _):
            assert HttpSearch(Client(url, retries=0), wiki=wiki).search([ask("a")]) == [[text]]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"result": None},
        {"result": [[], []]},
        [[{"contents": None}]],
        [[{"body": "x"}]],
        ["x"],
        [[{"document": None}]],
        3,
        {"result": [[["x"]]]},
        "",
        {"result": {}},
        [[{"contents": 5}]],
        [""],
        [{}],
        {"result": ""},
        [[{"text": 7}]],
        [[{"title": "a"}]],
        [[[]]],
        [[None]],
    ],
)
@pytest.mark.parametrize("wiki", [False, True])
def test_answers_of_another_form(answer, wiki):
    """An answer of any other form is a ServiceError, not an empty reply."""
    with serving(lambda *_: (200, answer)) as (url, _):
        with pytest.raises(ServiceError, match="/retrieve did not answer in the expected form"):
            HttpSearch(Client(url, retries=0), wiki=wiki).search([ask("a")])


def test_no_result_is_no_failure():
    """To find nothing is an answer, which is not asked for again."""
    for answer, wiki in (({"result": [[]]}, False), ([[]], False), ([], True)):
        with serving(lambda *_, answer=answer: (200, answer)) as (url, _):
            assert HttpSearch(Client(url, retries=0), wiki=wiki).search([ask("a")]) == [[]]


def test_a_query_that_fails_empties_its_part_alone():
    """A failed request empties the replies to its own queries, and counts each of them once."""

    def answer(path, body, headers):
        if "bad" in body["queries"]:
            return 500, "no"
        return 200, {"result": [[{"contents": query}] for query in body["queries"]]}

    requests = [ask("bad" if i == 3 else f"q{i}", noisy=i % 2) for i in range(80)]
    with serving(answer) as (url, _):
        engine = HttpSearch(Client(url, retries=0, on_error="empty"), top_k=2)
        with pytest.warns(UserWarning, match="answered 500"):
            ranked = engine.search(requests)
    assert ranked == [[] if i < AT_ONCE else [r.query] for i, r in enumerate(requests)]
    assert engine.failed == AT_ONCE
