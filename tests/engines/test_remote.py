"""The engines of other machines, against servers on loopback, and their cache."""

import json
import sqlite3
from dataclasses import replace
from multiprocessing import get_context
from urllib.parse import parse_qs, urlsplit

import pytest
from test_client import SECRET, serving
from test_engines import DOCUMENTS, ask

from minizs import UserError
from minizs.engines.client import (
    AT_ONCE,
    BETWEEN_WRITES,
    Cached,
    Client,
    HttpSearch,
    ServiceError,
    WebSearch,
)
from minizs.engines.ranking import BM25
from minizs.runs import build
from minizs.runs.flags import save_settings
from minizs.runs.settings import SearchConfig

SCORED, PLAIN, WIKI = "scored", "plain", "wiki"


def retriever(shape, documents=DOCUMENTS):
    """A retriever's answers as `serving` wants them, written out here in the published shapes."""
    engine = BM25(documents)

    def answer(path, body, headers):
        assert path == "/retrieve"
        if shape == WIKI:
            [found] = engine.rank([body["query"]], body["top_k"])
            return 200, [{"title": "", "text": text, "score": 0.5} for text in found]
        rows = engine.rank(body["queries"], body["topk"])
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
    """Guards a protocol that is misread, noise that is lost, replies to another's query."""
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
    """Guards asking for a whole corpus because every document holds the answer."""
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
    """Guards titles that are lost, and line breaks that look like another document."""
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
    """Guards a policy that is tested on empty replies because the server is no retriever."""
    with serving(lambda *_: (200, answer)) as (url, _):
        with pytest.raises(ServiceError, match="/retrieve did not answer in the expected form"):
            HttpSearch(Client(url, retries=0), wiki=wiki).search([ask("a")])


def test_no_result_is_no_failure():
    """Guards retries for a query that nothing is found for."""
    for answer, wiki in (({"result": [[]]}, False), ([[]], False), ([], True)):
        with serving(lambda *_, answer=answer: (200, answer)) as (url, _):
            assert HttpSearch(Client(url, retries=0), wiki=wiki).search([ask("a")]) == [[]]


def test_a_query_that_fails_empties_its_part_alone():
    """Guards a failure that is not counted, or twice, or that empties all queries of a turn."""

    def answer(path, body, headers):
        if "bad" in body["queries"]:
            return 500, "no"
        return 200, {"result": [[{"contents": query}] for query in body["queries"]]}

    requests = [ask("bad" if i == 3 else f"q{i}", noisy=i % 2) for i in range(80)]
    with serving(answer) as (url, _):
        engine = HttpSearch(Client(url, retries=0, on_error="empty"), top_k=2)
        with pytest.warns(UserWarning, match="answered 500"):
            found = engine.search(requests)
    assert found == [[] if i < AT_ONCE else [r.query] for i, r in enumerate(requests)]
    assert engine.failed == AT_ONCE


# ---- the web ------------------------------------------------------------------------------------

ROWS = [
    {"title": "Ann", "snippet": "born in\nRome", "link": "x"},
    {"title": "Only"},
    {"snippet": "a snippet"},
    {"title": "Oslo", "snippet": "a town"},
]
LINES = ["Ann born in Rome", "Only", "a snippet", "Oslo a town"]


def page(path, body, headers):
    """What the service says, as its manual has it."""
    assert path == "/search" and headers["X-API-KEY"] == SECRET
    assert body == {"q": "Ann born", "num": 10}
    return 200, {"searchParameters": {"q": "Ann born"}, "organic": ROWS}


def web(url, top_k=3, **options):
    return WebSearch(Client(url, retries=0, headers={"X-API-KEY": SECRET}, **options), top_k)


def test_web_results_are_title_and_snippet():
    """Guards a form that is misread, and a noisy reply that is paid for twice."""
    with serving(page) as (url, seen):
        found = web(url).search([ask("Ann born"), ask("Ann born", noisy=True)])
    assert found == [LINES[:3], LINES[1:]] and len(seen) == 2


def serpapi_page(path, body, headers):
    """What SerpAPI says, as its manual has it; a query "nothing" finds nothing."""
    address, asked = urlsplit(path), parse_qs(urlsplit(path).query)
    assert address.path == "/search" and body is None and "X-API-KEY" not in headers
    assert asked == {"engine": ["google"], "q": asked["q"], "num": ["10"], "api_key": [SECRET]}
    found = {
        "search_metadata": {"id": "5", "status": "Success"},
        "search_parameters": {"engine": "google", "q": asked["q"][0]},
    }
    if asked["q"] == ["nothing"]:
        return 200, found | {"error": "Google hasn't returned any results for this query."}
    return 200, found | {"organic_results": ROWS}


def test_serpapi(monkeypatch, tmp_path, caplog, capfd):
    """Guards a form that is misread, an empty page that is a failure, and a key in cache or log."""
    caplog.set_level(0)
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    monkeypatch.setenv("SERPAPI_API_KEY", f" {SECRET}\n")
    config = SearchConfig(engine="web", cache=str(tmp_path / "cache"))
    requests = [ask("Ann & born?"), ask("Ann & born?", noisy=True), ask("nothing")]
    with serving(serpapi_page) as (url, seen):
        monkeypatch.setattr("minizs.runs.build.SERPAPI", url)
        for _ in range(2):  # the second time out of the cache
            engine = build.build_engine(config, "test", None)
            assert engine.search(requests) == [LINES[:3], LINES[1:], []] and engine.failed == 0
        assert len(seen) == 3
        save_settings(config, tmp_path / "config.yaml")
    texts = [caplog.text, *capfd.readouterr(), (tmp_path / "config.yaml").read_text()]
    assert SECRET not in "".join(texts)
    assert SECRET.encode() not in (tmp_path / "cache").read_bytes()


def test_serpapi_fails_like_any_other(monkeypatch):
    """Guards other answers that pass for no results, a run that ends with the first hiccup, and
    failures that are not counted."""
    monkeypatch.setattr("minizs.engines.client.FIRST_WAIT", 0.001)
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    monkeypatch.setenv("SERPAPI_API_KEY", SECRET)
    config = SearchConfig(engine="web", retries=1, on_search_error="empty")
    failed = {"search_metadata": {"status": "Error"}, "error": f"We could not, {SECRET}."}
    for nonsense in (
        {},
        {"error": "Your account has run out of searches."},
        [],
        failed,
        {"search_metadata": {"status": "Success"}, "organic_results": ["x"]},
    ):
        with serving(lambda *_, nonsense=nonsense: (200, nonsense)) as (url, seen):
            monkeypatch.setattr("minizs.runs.build.SERPAPI", url)
            engine = build.build_engine(config, "test", None)
            with pytest.warns(UserWarning, match="/search did not answer in the exp") as warned:
                assert engine.search([ask("a")]) == [[]]
            assert (engine.failed, len(seen)) == (1, 2) and SECRET not in str(warned[0].message)
            stopping = replace(config, on_search_error="stop")
            with pytest.raises(ServiceError, match="expected form") as error:
                build.build_engine(stopping, "test", None).search([ask("a")])
            assert SECRET not in str(error.value)
    answers = [(429, {"error": "slower"})]
    with serving(lambda *call: answers.pop() if answers else serpapi_page(*call)) as (url, seen):
        monkeypatch.setattr("minizs.runs.build.SERPAPI", url)
        engine = build.build_engine(config, "test", None)
        assert engine.search([ask("a")]) == [LINES[:3]] and len(seen) == 2


def test_serper_comes_first(monkeypatch):
    """Guards a key that goes to the other service."""
    monkeypatch.setenv("SERPER_API_KEY", SECRET)
    monkeypatch.setenv("SERPAPI_API_KEY", "another")
    with serving(page) as (url, seen), serving(serpapi_page) as (other, unseen):
        monkeypatch.setattr("minizs.runs.build.SERPER", url)
        monkeypatch.setattr("minizs.runs.build.SERPAPI", other)
        engine = build.build_engine(SearchConfig(engine="web"), "test", None)
        assert engine.search([ask("Ann born")]) == [LINES[:3]]
        assert len(seen) == 1 and not unseen


def test_a_web_search_that_finds_nothing():
    """Guards a failure for no results, and other answers that pass for no results."""
    asked = {"searchParameters": {"q": "a"}}
    for more in ({"organic": []}, {"answerBox": {"answer": "x"}}, {"organic": None}):
        with serving(lambda *_, more=more: (200, asked | more)) as (url, _):
            assert web(url).search([ask("a")]) == [[]]
    for nonsense in (
        {},
        {"organic": []},
        [],
        asked | {"organic": [{"title": 5}]},
        asked | {"organic": ["x"]},
        asked | {"organic": 3},
    ):
        with serving(lambda *_, nonsense=nonsense: (200, nonsense)) as (url, _):
            with pytest.raises(ServiceError, match="expected form"):
                web(url).search([ask("a")])


def test_missing_titles_and_snippets():
    """Guards "None" in a document."""
    rows = [{"title": None, "snippet": "a"}, {"title": "b", "snippet": None}, {"title": None}]
    with serving(lambda *_: (200, {"searchParameters": {"q": "q"}, "organic": rows})) as (url, _):
        assert web(url).search([ask("q")]) == [["a", "b", ""]]


def test_the_web_engine_of_the_settings(monkeypatch):
    """Guards a key that is refused for how it came into the variable, or missed at a search."""
    config = SearchConfig(engine="web", on_search_error="empty")
    monkeypatch.setenv("SERPER_API_KEY", f" {SECRET}\n")
    with serving(page) as (url, _):
        monkeypatch.setattr("minizs.runs.build.SERPER", url)
        assert build.build_engine(config, "test", None).search([ask("Ann born")]) == [LINES[:3]]
    monkeypatch.setenv("SERPER_API_KEY", " \n")
    monkeypatch.setenv("SERPAPI_API_KEY", "")
    with pytest.raises(UserError, match="SERPER_API_KEY or SERPAPI_API_KEY"):
        build.build_engine(config, "test", None)


def test_web_keys_stay_secret(tmp_path, caplog, capfd):
    """Guards keys that leak into errors, logs or the cache."""
    caplog.set_level(0)
    with serving(lambda *_: (403, "")) as (url, _):
        with pytest.raises(ServiceError) as error:
            web(url).search([ask("Ann born")])
    with serving(page) as (url, _):
        Cached(web(url), str(tmp_path / "c"), url).search([ask("Ann born")])
    texts = [str(error.value), repr(vars(error.value)), caplog.text, *capfd.readouterr()]
    assert SECRET not in "".join(texts)
    assert SECRET.encode() not in (tmp_path / "c").read_bytes()


# ---- the cache ----------------------------------------------------------------------------------


class Counting:
    """BM25 that notes what it was asked, ends at a query "broken", and has none to "failing"."""

    def __init__(self, top_k=2):
        self.engine, self.top_k, self.asked = BM25(DOCUMENTS, top_k), top_k, []

    def find(self, requests):
        if any(request.query == "broken" for request in requests):
            raise ServiceError("The server is gone.")
        self.asked += requests
        found = self.engine.find(requests)
        return [
            None if request.query == "failing" else documents
            for request, documents in zip(requests, found, strict=True)
        ]


def test_nothing_is_asked_twice(tmp_path):
    """Guards an evaluation that pays again for what it knows, within a call, a run, or later."""
    requests = [ask("Ann born"), ask("Oslo"), ask("Ann born"), ask("Ann born", noisy=True)]
    expected, path = BM25(DOCUMENTS, 2).search(requests), str(tmp_path / "cache")
    first, later = Counting(), Counting()
    engine = Cached(first, path, "a")
    assert engine.search(requests) == expected and engine.search([]) == []
    assert engine.search(requests[::-1]) == expected[::-1]
    assert len(first.asked) == 3
    assert Cached(later, path, "a").search(requests) == expected and later.asked == []


def test_what_differs_is_asked_anew(tmp_path):
    """Guards replies of another engine, number of documents, or (noisy ones) another question."""
    path, engine = str(tmp_path / "cache"), Counting()
    Cached(engine, path, "a").search([ask("Ann born"), ask("Ann born", noisy=True)])
    for other, name in ((Counting(), "b"), (Counting(3), "a")):
        Cached(other, path, name).search([ask("Ann born")])
        assert len(other.asked) == 1
    again = Counting()
    cats = ask("Ann born", noisy=True, answers=("cats",))
    assert Cached(again, path, "a").search([cats]) == BM25(DOCUMENTS, 2).search([cats])
    Cached(again, path, "a").search([ask("Ann born", answers=("cats",))])
    assert again.asked == [cats]


def test_failures_are_counted_and_not_kept(tmp_path):
    """Guards "no information" that is kept for good where a server was away for a minute."""
    engine = Cached(inner := Counting(), str(tmp_path / "cache"), "a")
    for _ in range(2):
        found = engine.search([ask("failing"), ask("Oslo"), ask("failing")])
        assert [len(documents) for documents in found] == [0, 2, 0]
    assert engine.failed == 4
    assert [request.query for request in inner.asked] == ["failing", "Oslo", "failing"]


def test_what_came_before_a_failure_is_kept(tmp_path):
    """Guards an evaluation that dies at its last query, and starts from the first."""
    requests, path = [ask(f"Ann {i}") for i in range(BETWEEN_WRITES)], str(tmp_path / "cache")
    with pytest.raises(ServiceError):
        Cached(Counting(), path, "a").search([*requests, ask("broken")])
    Cached(again := Counting(), path, "a").search(requests)
    assert again.asked == []


def search_much(path, number):
    engine = Cached(Counting(), path, "a")
    for i in range(30):
        engine.search([ask(f"Ann {i}"), ask(f"Bob {number} {i}")])


def test_processes_share_a_cache(tmp_path):
    """Guards "database is locked" where several processes evaluate together."""
    path, context = str(tmp_path / "cache"), get_context("fork")
    workers = [context.Process(target=search_much, args=(path, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    rows = sqlite3.connect(path).execute("SELECT request, documents FROM replies").fetchall()
    assert len(rows) == 30 * 4 and all(len(json.loads(reply)) == 2 for _, reply in rows)


def test_files_that_are_no_cache(tmp_path):
    """Guards a traceback from SQLite, and someone's file that is overwritten."""
    (tmp_path / "text").write_text("some other file " * 100)
    for path in (tmp_path / "text", tmp_path, tmp_path / "no" / "where"):
        with pytest.raises(UserError, match="cannot be a cache"):
            Cached(Counting(), str(path), "a")
