"""Google's results by Serper, against a server on loopback."""

import pytest
from servers import SECRET, serving
from test_ranking import ask

from minizs import UserError
from minizs.engines.cache import Cached
from minizs.engines.client import Client, ServiceError
from minizs.engines.web import WebSearch
from minizs.runs import build
from minizs.runs.settings import SearchConfig

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
    """A reply is made of titles and snippets; a noisy one costs one page as well."""
    with serving(page) as (url, seen):
        replies = web(url).search([ask("Ann born"), ask("Ann born", noisy=True)])
    assert replies == [LINES[:3], LINES[1:]] and len(seen) == 2


def test_a_web_search_that_finds_nothing():
    """A page without results is an empty reply; an answer of another form is a failure."""
    answer = {"searchParameters": {"q": "a"}}
    for fields in ({"organic": []}, {"answerBox": {"answer": "x"}}, {"organic": None}):
        with serving(lambda *_, fields=fields: (200, answer | fields)) as (url, _):
            assert web(url).search([ask("a")]) == [[]]
    for nonsense in (
        {},
        {"organic": []},
        [],
        answer | {"organic": [{"title": 5}]},
        answer | {"organic": ["x"]},
        answer | {"organic": 3},
    ):
        with serving(lambda *_, nonsense=nonsense: (200, nonsense)) as (url, _):
            with pytest.raises(ServiceError, match="expected form"):
                web(url).search([ask("a")])


def test_missing_titles_and_snippets():
    """A missing title or snippet leaves its place empty."""
    rows = [{"title": None, "snippet": "a"}, {"title": "b", "snippet": None}, {"title": None}]
    with serving(lambda *_: (200, {"searchParameters": {"q": "q"}, "organic": rows})) as (url, _):
        assert web(url).search([ask("q")]) == [["a", "b", ""]]


def test_the_web_engine_of_the_settings(monkeypatch):
    """The key may have blanks around it in its variable; without one the engine is refused."""
    config = SearchConfig(engine="web", on_search_error="empty")
    monkeypatch.setenv("SERPER_API_KEY", f" {SECRET}\n")
    with serving(page) as (url, _):
        monkeypatch.setattr("minizs.runs.build.SERPER", url)
        assert build.build_engine(config, "test", None).search([ask("Ann born")]) == [LINES[:3]]
    monkeypatch.setenv("SERPER_API_KEY", " \n")
    with pytest.raises(UserError, match="Set SERPER_API_KEY"):
        build.build_engine(config, "test", None)


def test_web_keys_stay_secret(tmp_path, caplog, capfd):
    """No error, log or cache holds the key."""
    caplog.set_level(0)
    with serving(lambda *_: (403, "")) as (url, _):
        with pytest.raises(ServiceError) as error:
            web(url).search([ask("Ann born")])
    with serving(page) as (url, _):
        Cached(web(url), str(tmp_path / "c"), url).search([ask("Ann born")])
    texts = [str(error.value), repr(vars(error.value)), caplog.text, *capfd.readouterr()]
    assert SECRET not in "".join(texts)
    assert SECRET.encode() not in (tmp_path / "c").read_bytes()
