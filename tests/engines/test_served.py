"""A simulator on a server: the documents of the same model here, and what servers do otherwise."""

import socket
import subprocess
import sys
import time

import pytest
from servers import openai, serving

from minizs import UserError
from minizs.engines.client import Client, ServiceError
from minizs.engines.served import ServedModel, ServedSearch
from minizs.judge import Judge
from minizs.models import loading
from minizs.simulator import SimulatedSearch, load_template
from minizs.trajectory import SearchRequest

TEMPLATE = "{query}|{question}|{answers}|{quality}|{top_k}:\n"


def request(query="a query", noisy=False, key=(0,)):
    return SearchRequest(query, "a question?", ("Paris", "Lutetia"), noisy, key)


def served(url, top_k=3, seed=0, template=TEMPLATE, retries=0, on_error="stop", **model):
    client = Client(url, retries=retries, on_error=on_error)
    return ServedSearch(ServedModel(client, **model), template, top_k, seed)


def completion(text, reason="stop"):
    return 200, {"choices": [{"text": text, "finish_reason": reason}]}


def chat(content, reason="stop", **fields):
    message = {"role": "assistant", "content": content, **fields}
    return 200, {"choices": [{"message": message, "finish_reason": reason}]}


@pytest.mark.filterwarnings("ignore:A search has failed")
@pytest.mark.parametrize("length", [80, 22])  # enough for all documents, and too few
def test_served_documents_are_the_local_ones(length):
    """Through both methods the documents are those of the model here, also where one is cut."""
    model, tokenizer = loading.load_model("tiny")
    template = load_template(loading.resolve("tiny"))
    queries = [("Stoulmen was born in", False), ("Featha", True), ("Klinstead lies in", False)]
    requests = [request(query, noisy, (i, 3)) for i, (query, noisy) in enumerate(queries)]
    local = SimulatedSearch(model, tokenizer, template, 3, 5, 0.0, length).search(requests)
    options = {"seed": 5, "template": template, "temperature": 0.0, "max_new_tokens": length}
    options["on_error"] = "empty"
    with serving(openai(model, tokenizer, seen := [])) as (url, _):
        engine = served(f"{url},{url}/v1", **options)
        assert engine.search(requests) == local and engine.search([]) == []
        assert served(url, name="another", api="chat", **options).search(requests) == local
    assert any(local) and (length == 80) == all(len(reply) == 3 for reply in local)
    posts = [(path, body["model"]) for path, body in seen if body]
    assert posts[:3] == [("/v1/completions", "the-simulator")] * 3
    assert posts[3:] == [("/v1/chat/completions", "another")] * 3


@pytest.mark.filterwarnings("ignore:A search has failed")
def test_a_served_reply_has_its_own_seed():
    """Seeds differ between requests, are the same again for the same run, and fit into 31 bits."""
    model, tokenizer = loading.load_model("tiny")
    template = load_template(loading.resolve("tiny"))
    seeds = []
    requests = [request(key=(0, i)) for i in range(4)]
    for seed in (1, 1, 2):
        with serving(openai(model, tokenizer, seen := [])) as (url, _):
            served(url, 1, seed, template, on_error="empty", max_new_tokens=9).search(requests)
        bodies = [body for _, body in seen if body]
        assert {body["temperature"] for body in bodies} == {0.8}
        assert {body["max_tokens"] for body in bodies} == {9}
        seeds.append({body["seed"] for body in bodies})
    assert seeds[0] == seeds[1] and seeds[0].isdisjoint(seeds[2]) and len(seeds[0]) == 4
    assert all(0 <= seed < 2**31 for seed in seeds[0] | seeds[2])


@pytest.mark.parametrize(
    "content",
    [
        {"choices": []},
        {"choices": [{"text": None, "finish_reason": "stop"}]},
        {"choices": [{"text": "Doc 1: a"}]},
    ],
)
def test_a_server_of_another_kind_is_told(content):
    """An answer that is not OpenAI's is an error, not an empty reply to train on."""
    with serving(lambda *_: (200, content)) as (url, _):
        with pytest.raises(ServiceError, match="/v1/completions did not answer in"):
            served(url, name="m").search([request()])


# ---- replies without documents ------------------------------------------------------------------


def test_a_retry_has_another_seed():
    """The same seed would write the same reply: a retry of a reply of no use takes a new one."""
    replies = ["Sorry.", "", "Doc 1: a fact"]
    answer = lambda _, body, __: completion(replies.pop(0)) if body else (404, "")  # noqa: E731
    with serving(answer) as (url, seen):
        assert served(url, name="m", retries=2).search([request()]) == [["a fact"]]
    seeds = [body["seed"] for _, body in seen if body]
    assert len({*seeds}) == len(seeds) == 3


def without(share):
    """A server whose replies lack documents for this share of the queries."""

    def answer(path, body, headers):
        if body is None:
            return 200, {"data": [{"id": "m"}]}
        number = int(body["prompt"].split("|")[0])
        return completion("I cannot do that." if number % 10 < 10 * share else "Doc 1: a fact")

    return answer


def test_one_reply_without_documents_is_empty_and_counted():
    """A run goes on after it, and after later ones of which each is alone in its turn."""
    with serving(without(0.1)) as (url, _):
        engine = served(url)
        with pytest.warns(UserWarning, match="nothing to use .it holds no document"):
            replies = engine.search([request(str(i)) for i in range(10)])
        assert replies == [[]] + [["a fact"]] * 9 and engine.failed == 1
        with pytest.warns(UserWarning, match="nothing to use"):
            assert engine.search([request("10")]) == [[]] and engine.failed == 2


@pytest.mark.filterwarnings("ignore:A search has failed")
def test_where_most_lack_documents_it_says_what_was_written():
    """Then the simulator is of no use, and the sentence shows a reply instead of guessing."""
    with serving(without(0.6)) as (url, _):
        requests = [request(str(i)) for i in range(10)]
        with pytest.raises(ServiceError, match="6 of the last 10 .*'I cannot do that.'") as error:
            served(url).search(requests)
        assert "--simulator_template" in str(error.value) and "key" not in str(error.value)
        engine = served(url, on_error="empty")
        assert engine.search(requests) == [[]] * 6 + [["a fact"]] * 4 and engine.failed == 6


@pytest.mark.filterwarnings("ignore:A search has failed")
def test_what_was_written_does_not_repeat_the_key():
    """A server that echoes the key does not bring it into the error."""
    answer = lambda path, body, headers: completion(f"Your key is {headers['Authorization'][7:]}")  # noqa: E731
    with serving(answer) as (url, _):
        client = Client(url, retries=0, headers={"Authorization": "Bearer abc123"})
        engine = ServedSearch(ServedModel(client, "m"), TEMPLATE)
        with pytest.raises(ServiceError, match=r"'Your key is \(key\)'") as error:
            engine.search([request(), request()])
    assert "abc123" not in str(error.value)


@pytest.mark.filterwarnings("ignore:A search has failed")
@pytest.mark.parametrize(
    "disguise",
    [
        str.upper,
        "-".join,
        "\u200b".join,
        lambda key: f"{key[:12]} {key[12:]}",
        lambda key: f"{key[:9]}...",
        lambda key: "".join(f"%{ord(letter):02x}" for letter in key),
        lambda key: "".join(f"\\u{ord(letter):04x}" for letter in key),
        lambda key: "".join(f"&#{ord(letter)};" for letter in key),
    ],
)
def test_a_key_in_disguise_is_not_repeated_either(disguise):
    """A reply that holds a part of the key, however it is written, is not quoted at all."""
    key = "sk-AbCd1234-eFgH5678"
    answer = lambda path, body, headers: completion(f"Your key is {disguise(key)}")  # noqa: E731
    with serving(answer) as (url, _):
        client = Client(url, retries=0, headers={"Authorization": f"Bearer {key}"})
        engine = ServedSearch(ServedModel(client, "m"), TEMPLATE)
        with pytest.raises(ServiceError, match="withheld") as error:
            engine.search([request(), request()])
    assert disguise(key) not in str(error.value)
    assert client.redact("the bearer of news") == "the bearer of news"


@pytest.mark.filterwarnings("ignore:A search has failed")
def test_a_reply_that_is_all_thought_has_failed():
    """`content` is null where a thinking model came to no reply: no document, and no traceback."""
    answers = [chat(None, reasoning_content="Well,"), chat("Doc 1: a fact", reasoning_content="x")]
    with serving(lambda path, body, _: answers.pop(0) if body else (404, "")) as (url, _):
        assert served(url, name="m", api="chat", retries=1).search([request()]) == [["a fact"]]
    with serving(lambda path, body, _: chat(None, "length", reasoning_content="We")) as (url, _):
        engine = served(url, name="m", api="chat", on_error="empty")
        assert engine.search([request()]) == [[]] and engine.failed == 1


@pytest.mark.filterwarnings("ignore:A search has failed")
@pytest.mark.parametrize(
    "text, documents",
    [
        ("<think>Doc 1: a draft</think> Doc 1: a fact", ["a fact"]),
        ("hm </think>Doc 1: a fact", ["a fact"]),
        ("<think>Doc 1: a draft", []),
        ("Doc 1: half a", []),
    ],
)
def test_thoughts_are_no_documents(text, documents):
    """Only what stands behind the last thought counts; a reply that breaks off has failed."""
    reason = "stop" if documents else "length"
    with serving(lambda path, body, _: completion(text, reason) if body else (404, "")) as (url, _):
        engine = served(url, name="m", on_error="empty")
        assert engine.search([request()]) == [documents]
        assert engine.failed == (not documents)


# ---- what servers want --------------------------------------------------------------------------


def test_max_completion_tokens_where_max_tokens_is_refused():
    """OpenAI's newer models take the limit by another name: it is tried, then kept."""
    refusal = {
        "message": "Unsupported parameter: use 'max_completion_tokens' instead.",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": "unsupported_parameter",
    }

    def answer(path, body, headers):
        if body is None:
            return 200, {"data": [{"id": "m"}]}
        return (400, {"error": refusal}) if "max_tokens" in body else chat("Doc 1: a fact")

    with serving(answer) as (url, seen):
        engine = served(url, api="chat", max_new_tokens=77)
        assert engine.search([request(key=(i,)) for i in range(4)]) == [["a fact"]] * 4
        first = len(seen)
        engine.search([request()])
    assert len(seen) == first + 1 and seen[-1][1]["max_completion_tokens"] == 77
    assert "max_tokens" not in seen[-1][1]


def test_a_temperature_that_is_refused_is_left_out():
    """OpenAI's models that think take no temperature, no top_p and no max_tokens. The server names
    one at a time; what the model does instead is said once."""

    def answer(path, body, headers):
        if body is None:
            return 200, {"data": [{"id": "m"}]}
        if "max_tokens" in body:
            return 400, {"error": {"message": "use 'max_completion_tokens'"}}
        for name in ("temperature", "top_p"):
            if name in body:
                return 400, {"error": {"param": name, "code": "unsupported_value"}}
        return chat("Doc 1: a fact")

    with serving(answer) as (url, seen):
        engine = served(url, api="chat", temperature=0.5)
        with pytest.warns(UserWarning, match="m takes no (temperature|top_p)") as told:
            assert engine.search([request(key=(i,)) for i in range(4)]) == [["a fact"]] * 4
        assert sum("takes no" in str(warning.message) for warning in told) == 2
        first = len(seen)
        engine.search([request()])
    assert len(seen) == first + 1 and not {"temperature", "top_p"} & {*seen[-1][1]}


@pytest.mark.parametrize(
    "message, documents",
    [
        ({"content": [{"type": "text", "text": "Doc 1: a"}]}, ["a"]),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "Doc 1: b"}]},
                    {"type": "text", "text": "Doc 1: a"},
                ]
            },
            ["a"],
        ),
        ({"content": "", "reasoning_content": "Doc 1: b"}, []),
        ({"content": None, "reasoning": "Doc 1: b"}, []),
        ({"reasoning": "Doc 1: b"}, []),
        ({"content": None, "refusal": "no"}, []),
    ],
)
def test_the_forms_of_a_message(message, documents):
    """Content can come in parts, the thought in a field of two names, and nothing as null."""
    answer = 200, {"choices": [{"message": message, "finish_reason": "stop"}]}
    with serving(lambda path, body, _: answer if body else (404, "")) as (url, _):
        engine = served(url, name="m", api="chat", on_error="empty")
        if documents:
            assert engine.search([request()]) == [documents]
            return
        with pytest.warns(UserWarning, match="it holds no document"):
            assert engine.search([request()]) == [[]]
        engine = served(url, name="m", api="chat")
        with pytest.warns(UserWarning), pytest.raises(ServiceError, match="2 of the last 2"):
            engine.search([request(), request()])


@pytest.mark.filterwarnings("ignore:A search has failed")
@pytest.mark.parametrize(
    "message",
    [{"content": None, "reasoning_content": "noisy"}, {"content": "<think>noisy"}, {"content": ""}],
)
def test_a_judge_without_a_word(message):
    """A judge that only thinks says no word, and the searches beside it keep theirs."""
    searches = [(request(f"query {i}"), ["a document"]) for i in range(2)]

    def answer(path, body, headers):
        if body is None:
            return 404, ""
        says = message if "query 0" in str(body) else {"content": "Useful"}
        return 200, {"choices": [{"message": says, "finish_reason": "stop"}]}

    with serving(answer) as (url, _):
        judge = Judge(ServedModel(Client(url, retries=0), "m", "chat").write)
        assert judge.verdicts(searches) == ["", "useful"]


def test_arguments_of_the_chat_template_are_sent():
    """`chat_template_kwargs` is what servers call them; completions have no template."""
    with serving(lambda path, body, _: chat("Doc 1: a") if body else (404, "")) as (url, seen):
        args = {"enable_thinking": False}
        served(url, name="m", api="chat", template_args=args).search([request()])
        assert seen[-1][1]["chat_template_kwargs"] == args
        served(url, name="m", api="chat").search([request()])
        assert "chat_template_kwargs" not in seen[-1][1]


def test_a_name_that_the_server_lacks_is_told_at_the_start():
    """The error names the models that are there; a server without a list is believed."""
    listed = lambda *_: (200, {"data": [{"id": "one"}, {"id": "two"}]})  # noqa: E731
    with serving(listed) as (url, _):
        with pytest.raises(UserError, match=f"{url} has no model 'other'; it has one, two"):
            ServedModel(Client(url), "other")
        assert ServedModel(Client(url)).name == "one"
        assert ServedModel(Client(url), "two").name == "two"
    with serving(lambda *_: (404, "")) as (url, _):
        assert ServedModel(Client(url), "other").name == "other"
        with pytest.raises(ServiceError, match="/v1/models answered 404"):
            ServedModel(Client(url))
    with serving(lambda *_: (401, {"error": {"code": "invalid_api_key"}})) as (url, _):
        with pytest.raises(ServiceError, match="answered 401 invalid_api_key .*check the key"):
            ServedModel(Client(url), "other")
    with serving(lambda *_: (200, {"data": []})) as (url, _):
        with pytest.raises(UserError, match="serves no model"):
            ServedModel(Client(url))


@pytest.mark.slow
def test_transformers_serve(tmp_path):
    """The protocol is that of a real server, `transformers serve`."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = loading.resolve("tiny")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log
        )
    try:
        url = f"http://127.0.0.1:{port}"
        template = load_template(folder)
        for _ in range(120):
            try:
                Client(url, retries=0).get("/health", lambda _: None)
                break
            except ServiceError:
                time.sleep(1)
        requests = [request(f"{name} was born in", key=(1,)) for name in ("Stoulmen", "Featha")]
        local = SimulatedSearch(*loading.load_model("tiny"), template, 3, 0, 0.0, 100).search(
            requests
        )
        options = {"temperature": 0.0, "max_new_tokens": 100, "template": template}
        assert any(local)
        for name in (folder, ""):  # it needs no name
            assert served(url, name=name, **options).search(requests) == local
    finally:
        server.terminate()
        server.wait(20)
