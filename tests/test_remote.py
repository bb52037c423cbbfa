"""The engines of other machines, against servers on loopback, and their cache."""

import json
import sqlite3
from multiprocessing import get_context

import pytest
from test_client import SECRET, serving
from test_engines import DOCUMENTS, ask

from minizs.client import Client, ServiceError
from minizs.config import UserError
from minizs.engines import BM25
from minizs.remote import AT_ONCE, Cached, HttpSearch, WebSearch

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
        return 200, {"result": [[{"document": {"id": "7", "contents": text}, "score": 1.5}
                                 for text in row] for row in rows]}  # fmt: skip

    return answer


@pytest.mark.parametrize("shape", [SCORED, PLAIN, WIKI])
def test_a_retrievers_documents_are_those_of_the_engine_behind_it(shape):
    """Guards a protocol that is misread, noise that is lost, replies to another's query."""
    requests = [ask(query, noisy) for query in ("Ann born in", "Oslo lies", "works for Acme")
                for noisy in (False, True)] * 7  # fmt: skip
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


@pytest.mark.parametrize("document, text", [
    ({"contents": '"Ann"\nborn\n in Rome\n'}, '"Ann" born in Rome'),
    ({"title": "Ann", "text": "born\nin Rome"}, '"Ann" born in Rome'),
    ({"title": "", "text": "born"}, "born"),
    ({"document": {"title": None, "text": "born"}, "score": 1}, "born"),
])  # fmt: skip
def test_a_document_is_its_title_and_text_on_a_line(document, text):
    """Guards titles that are lost, and line breaks that look like another document."""
    for answer in ({"result": [[document]]}, [[document]], [document]):
        with serving(lambda *_, answer=answer: (200, answer)) as (url, _):
            assert HttpSearch(Client(url, retries=0)).search([ask("a")]) == [[text]]


@pytest.mark.parametrize("answer", [
    {}, {"result": None}, {"result": [[], []]}, [[{"contents": None}]], [[{"body": "x"}]], ["x"],
    [[{"document": None}]], 3, {"result": [[["x"]]]},
])  # fmt: skip
def test_answers_of_another_form(answer):
    """Guards a policy that is tested on empty replies because the server is no retriever."""
    with serving(lambda *_: (200, answer)) as (url, _):
        with pytest.raises(ServiceError, match="/retrieve did not answer in the expected form"):
            HttpSearch(Client(url, retries=0)).search([ask("a")])


def test_no_result_is_no_failure():
    """Guards retries for a query that nothing is found for."""
    for answer in ({"result": [[]]}, [[]], []):
        with serving(lambda *_, answer=answer: (200, answer)) as (url, _):
            assert HttpSearch(Client(url, retries=0)).search([ask("a")]) == [[]]


# ---- the web ------------------------------------------------------------------------------------

ROWS = [{"title": "Ann", "snippet": "born in\nRome", "link": "x"}, {"title": "Only"},
        {"snippet": "a snippet"}, {"title": "Oslo", "snippet": "a town"}]  # fmt: skip
LINES = ["Ann born in Rome", "Only", "a snippet", "Oslo a town"]


@pytest.fixture
def keys(monkeypatch):
    for name in ("SERPER_API_KEY", "SERPAPI_API_KEY"):
        monkeypatch.setenv(name, SECRET)


def page(path, body, headers):
    """What the two services say, as their manuals have it."""
    if body is None:  # SerpAPI
        assert f"api_key={SECRET}" in path and "engine=google" in path and "q=Ann+born" in path
        return 200, {"search_metadata": {}, "organic_results": ROWS}
    assert headers["X-API-KEY"] == SECRET and body == {"q": "Ann born", "num": 10}
    return 200, {"searchParameters": {}, "organic": ROWS}


@pytest.mark.parametrize("provider", ["serper", "serpapi"])
def test_web_results_are_title_and_snippet(provider, keys):
    """Guards a provider's form that is misread, and a noisy reply that is paid for twice."""
    with serving(page) as (url, seen):
        engine = WebSearch(provider, 3, url=url, retries=0)
        found = engine.search([ask("Ann born"), ask("Ann born", noisy=True)])
    assert found == [LINES[:3], LINES[1:]]
    assert len(seen) == 2 and {path.split("?")[0] for path, _ in seen} == {"/search"}


def test_a_web_search_that_finds_nothing(keys):
    """Guards SerpAPI's "error" for no results, and other errors that pass for no results."""
    with serving(lambda *_: (200, {"error": "Google hasn't returned any results for this query."})
                 ) as (url, _):  # fmt: skip
        assert WebSearch("serpapi", url=url, retries=0).search([ask("a")]) == [[]]
    for provider, answer in (
        ("serper", {"organic": []}), ("serper", {"answerBox": {"answer": "x"}}),
        ("serper", {"organic": None}), ("serpapi", {"search_metadata": {}}),
    ):  # fmt: skip
        with serving(lambda *_, answer=answer: (200, answer)) as (url, _):
            assert WebSearch(provider, url=url, retries=0).search([ask("a")]) == [[]]


@pytest.mark.parametrize("provider", ["serper", "serpapi"])
def test_a_web_searchs_error_is_told(provider, keys):
    """Guards errors that pass for no results, are not named, or repeat the key."""
    answer = {"error": f"The account of {SECRET} has\nno searches left."}
    with serving(lambda *_: (200, answer)) as (url, seen):
        with pytest.raises(ServiceError, match="/search answered .*has no searches left") as error:
            WebSearch(provider, url=url, retries=0).search([ask("a")])
    assert SECRET not in str(error.value) and "\n" not in str(error.value)
    assert error.value.__cause__ is error.value.__context__ is None and len(seen) == 1


def test_missing_titles_and_snippets(keys):
    """Guards "None" in a document."""
    rows = [{"title": None, "snippet": "a"}, {"title": "b", "snippet": None}, {"title": None}]
    with serving(lambda *_: (200, {"organic": rows})) as (url, _):
        assert WebSearch("serper", url=url, retries=0).search([ask("q")]) == [["a", "b", ""]]


def test_a_key_with_a_line_break(monkeypatch):
    """Guards a key that is refused for how it came into the variable."""
    monkeypatch.setenv("SERPER_API_KEY", f" {SECRET}\n")
    with serving(page) as (url, _):
        assert WebSearch("serper", url=url, retries=0).search([ask("Ann born")]) == [LINES[:3]]
    monkeypatch.setenv("SERPER_API_KEY", " \n")
    with pytest.raises(UserError, match="SERPER_API_KEY"):
        WebSearch("serper")


@pytest.mark.parametrize("provider, variable", [("serper", "SERPER_API_KEY"),
                                                ("serpapi", "SERPAPI_API_KEY")])  # fmt: skip
def test_a_missing_key_is_named(provider, variable, monkeypatch):
    """Guards a run that ends at its first search."""
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=variable):
        WebSearch(provider)


@pytest.mark.parametrize("provider", ["serper", "serpapi"])
def test_web_keys_stay_secret(provider, keys, tmp_path, caplog, capfd):
    """Guards keys that leak into errors, logs or the cache."""
    caplog.set_level(0)
    with serving(lambda *_: (403, "")) as (url, _):
        with pytest.raises(ServiceError) as error:
            WebSearch(provider, url=url).search([ask("Ann born")])
    with serving(page) as (url, _):
        engine = Cached(WebSearch(provider, url=url), str(tmp_path / "c"), provider)
        engine.search([ask("Ann born")])
    texts = [str(error.value), repr(vars(error.value)), caplog.text, *capfd.readouterr()]
    assert SECRET not in "".join(texts)
    assert SECRET.encode() not in (tmp_path / "c").read_bytes()


# ---- the cache ----------------------------------------------------------------------------------


class Counting:
    """BM25 that notes what it was asked, and fails at a query "broken"."""

    def __init__(self, top_k=2):
        self.engine, self.top_k, self.asked = BM25(DOCUMENTS, top_k), top_k, []

    def search(self, requests):
        if any(request.query == "broken" for request in requests):
            raise ServiceError("The server is gone.")
        self.asked += requests
        return self.engine.search(requests)


def test_nothing_is_asked_twice(tmp_path):
    """Guards an evaluation that pays again for what it knows, within a call, a run, or later."""
    requests = [ask("Ann born"), ask("Oslo"), ask("Ann born"), ask("Ann born", noisy=True)]
    expected, path = BM25(DOCUMENTS, 2).search(requests), str(tmp_path / "cache")
    first, later = Counting(), Counting()
    engine = Cached(first, path, "a")
    assert engine.search(requests) == expected and engine.search([]) == []
    assert (engine.hits, engine.misses, len(first.asked)) == (1, 3, 3)
    assert engine.search(requests[::-1]) == expected[::-1]
    assert (engine.hits, engine.misses) == (5, 3)
    assert Cached(later, path, "a").search(requests) == expected and later.asked == []


def test_what_differs_is_asked_anew(tmp_path):
    """Guards replies of another engine, number of documents, or (noisy ones) another question."""
    path, engine = str(tmp_path / "cache"), Counting()
    Cached(engine, path, "a").search([ask("Ann born"), ask("Ann born", noisy=True)])
    for other in (Cached(engine, path, "b"), Cached(Counting(3), path, "a")):
        other.search([ask("Ann born")])
        assert other.misses == 1
    again = Cached(engine, path, "a")
    cats = ask("Ann born", noisy=True, answers=("cats",))
    assert again.search([cats]) == BM25(DOCUMENTS, 2).search([cats]) and again.misses == 1
    again.search([ask("Ann born", answers=("cats",))])
    assert again.hits == 1


def test_what_came_before_a_failure_is_kept(tmp_path):
    """Guards an evaluation that dies at its last query, and starts from the first."""
    requests, path = [ask(f"Ann {i}") for i in range(AT_ONCE)], str(tmp_path / "cache")
    with pytest.raises(ServiceError):
        Cached(Counting(), path, "a").search([*requests, ask("broken")])
    engine = Cached(Counting(), path, "a")
    assert len(engine.search(requests)) == engine.hits == AT_ONCE


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


@pytest.mark.parametrize("columns", ["id, author, text", "request", "documents, request"])
def test_anothers_table_is_no_cache(tmp_path, columns):
    """Guards an error at the first reply, which has been paid for, and rows in another's table."""
    file = sqlite3.connect(tmp_path / "c")
    file.execute(f"CREATE TABLE replies ({columns})")
    with pytest.raises(UserError, match="cannot be a cache: its table 'replies'"):
        Cached(Counting(), str(tmp_path / "c"), "a")
