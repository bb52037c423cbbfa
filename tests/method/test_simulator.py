"""The simulated search engine: its prompt, its training texts, its replies."""

import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from conftest import make_model, make_tokenizer, with_bos
from test_client import serving

from minizs import UserError, simulator
from minizs.engines.client import Client, ServiceError
from minizs.generate import Generated, generate
from minizs.models import loading
from minizs.protocol import number_documents
from minizs.sft import encode
from minizs.simulator import ServedSearch, SimulatedSearch, load_template, prompt, training_text
from minizs.trajectory import SearchRequest

PROMPT = load_template("tuned")
TEMPLATE = "{query}|{question}|{answers}|{quality}|{top_k}:\n"


def request(query="a query", noisy=False, key=(0,), answers=("Paris", "Lutetia")):
    return SearchRequest(query, "a question?", answers, noisy, key)


# ---- the prompt ---------------------------------------------------------------------------------


def test_one_word_makes_the_difference():
    """Guards prompts from which the quality could be told by anything but the word (Table 2)."""
    useful, noisy = (prompt(PROMPT, request(noisy=noisy), 3) for noisy in (False, True))
    assert useful != noisy and useful.replace("useful", "noisy") == noisy
    assert "a query" in useful and "a question?" in useful and "{" not in useful


def test_all_gold_answers_are_named():
    """Guards D15: only the first gold answer reached the simulator."""
    assert prompt(TEMPLATE, request(), 3) == "a query|a question?|Paris or Lutetia|useful|3:\n"


def test_the_number_of_documents_is_the_one_asked_for():
    """Guards a hard-coded "five documents" where top_k is something else."""
    assert "write 7 useful documents" in prompt(PROMPT, request(), 7)


def test_a_query_cannot_fill_in_the_answer():
    """Guards a policy that learns to search for "{answers}" and is shown the gold answer."""
    template, query = "{query}\n{answers}", "{answers} {quality}"
    assert prompt(template, request(query), 3) == query + "\nParis or Lutetia"


def test_the_wording_travels_with_the_model(tmp_path):
    """Guards a simulator that is asked otherwise than it was trained to be."""
    assert load_template(tmp_path) == PROMPT
    (tmp_path / simulator.PROMPT_FILE).write_text(TEMPLATE)
    assert load_template(tmp_path) == load_template(tmp_path / simulator.PROMPT_FILE) == TEMPLATE
    assert load_template("no-one/has-this-model") == PROMPT


def test_a_template_without_a_query_is_refused(tmp_path):
    """Guards any other file that is given for a template."""
    (tmp_path / "other.txt").write_text("{question}")
    with pytest.raises(UserError, match="other.txt is no simulator's prompt"):
        load_template(tmp_path / "other.txt")


def test_an_untuned_model_is_shown_both_kinds():
    """Guards a worked example that lacks one kind, or that the request's own word changes."""
    useful, noisy = (prompt(load_template("untuned"), request(noisy=n), 4) for n in (False, True))
    for text, word in ((useful, "useful"), (noisy, "noisy")):
        assert f"Now write 4 documents of {word} information." in text
        assert text.endswith(
            f'"a question?", whose answer is Paris or Lutetia.\nQuery: a query\n{word} output:\n'
        )
        assert "{" not in text
    example = useful.split("Now write")[0]
    assert noisy.startswith(example) and "useful output" in example and "noisy output" in example
    shown = example.split("noisy output:")
    assert "Danube" in shown[0].split("useful output:")[1] and "Danube" not in shown[1]


# ---- training -----------------------------------------------------------------------------------


def test_the_loss_is_on_the_documents_and_eos_alone():
    """Guards a simulator that learns to write questions, or never learns to stop."""
    tokenizer, documents = make_tokenizer(), ["one", "two"]
    ids, mask = encode(tokenizer, training_text(TEMPLATE, request(), documents), end=True)
    marked = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(marked) == number_documents(documents) + "<eos>"
    assert mask == sorted(mask)  # one stretch, at the end


def test_training_starts_with_the_ids_of_use():
    """Guards a prompt that is tokenised otherwise in use: merged with what follows, or no BOS."""
    tokenizer = with_bos(make_tokenizer(("\nD",)))
    documents = ["one", "two", "three"]
    ids, mask = encode(tokenizer, training_text(TEMPLATE, request(), documents), end=True)
    seen = []

    def spy(model, prompts, *rest, **options):
        seen.extend(prompts)
        return [Generated()] * len(prompts)

    with mock.patch("minizs.simulator.generate", spy):
        SimulatedSearch(None, tokenizer, TEMPLATE).search([request()])
    assert seen == [ids[: mask.index(1)]]


# ---- replies ------------------------------------------------------------------------------------


def test_all_requests_of_a_turn_are_one_generation():
    """Guards D9: a generation a query. And replies handed to the wrong query."""
    tokenizer, calls = make_tokenizer(), []

    def answer(model, prompts, max_new_tokens, **options):
        calls.append(options)
        texts = [tokenizer.decode(p) for p in prompts]
        replies = [number_documents([f"on {text[0]}", "x", "", "y", "z"]) for text in texts]
        return [Generated(tokenizer.encode(reply) + [1], reason="eos") for reply in replies]

    engine = SimulatedSearch(None, tokenizer, TEMPLATE, top_k=3, seed=4, temperature=0.8)
    with mock.patch("minizs.simulator.generate", answer):
        found = engine.search([request("a", key=(1, 2)), request("b", key=(3, 4))])
        assert engine.search([]) == []
    assert found == [["on a", "x", "y"], ["on b", "x", "y"]]
    assert len(calls) == 1
    assert calls[0]["keys"] == [(1, 2), (3, 4)]
    assert (calls[0]["seed"], calls[0]["temperature"]) == (4, 0.8)


def test_a_half_written_document_is_not_passed_on():
    """Guards sentences that break off: a reader cannot tell what they would have said."""
    tokenizer = make_tokenizer()
    cases = {  # a reply that ran out of tokens, and what is whole in it
        "Doc 1: one\nDoc 2: tw": ["one"],
        "Doc 1: one\nDoc 2:": ["one"],
        "Doc 1: on": [],
        "Doc 1: a\nDoc 2: b\nDoc 3: c": ["a", "b"],
        "nothing": [],
    }
    replies = [Generated(tokenizer.encode(text), reason="length") for text in cases]
    engine = SimulatedSearch(None, tokenizer, TEMPLATE, top_k=2)
    with mock.patch("minizs.simulator.generate", lambda *_, **__: replies):
        assert engine.search([request()] * len(cases)) == list(cases.values())


def test_replies_do_not_depend_on_who_else_searches():
    """Guards documents that change with the batch, and so with the number of processes."""
    tokenizer = make_tokenizer(tuple(f"Doc {i}:" for i in range(40)))
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=512, dtype=torch.float64)
    requests = [request(q * 3, q in "ac", (7, i)) for i, q in enumerate("abcde")]
    raw = []

    def spy(*arguments, **options):
        raw.append(generate(*arguments, **options))
        return raw[-1]

    engine = SimulatedSearch(model, tokenizer, TEMPLATE, max_new_tokens=60)
    with mock.patch("minizs.simulator.generate", spy):
        together = engine.search(requests)
        alone = [engine.search([r])[0] for r in requests]
        turned = engine.search(requests[::-1])[::-1]
    assert any(together) and alone == together == turned
    ids = [[out.ids for out in outs] for outs in raw]
    assert sum(ids[1:6], []) == ids[0] == ids[6][::-1]
    other = SimulatedSearch(model, tokenizer, TEMPLATE, seed=1, max_new_tokens=60)
    assert other.search(requests) != together
    equal = engine.search([request(key=(0, 0)), request(key=(0, 1))])
    assert equal[0] != equal[1]  # the same query twice is answered twice


# ---- served -------------------------------------------------------------------------------------


def openai(model, tokenizer, seen):
    """An OpenAI-compatible server around `model`, for `serving`."""

    def answer(path, body, headers):
        seen.append((path, body))
        if path == "/v1/models":
            return 200, {"data": [{"id": "the-simulator"}, {"id": "another"}]}
        text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        [reply] = generate(
            model,
            tokenizer([text])["input_ids"],
            body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"],
            vocab_size=len(tokenizer),
            eos_id=tokenizer.eos_token_id,
        )
        text = tokenizer.decode(reply.ids, skip_special_tokens=True)
        reason = "length" if reply.reason == "length" else "stop"
        said = {"message": {"role": "assistant", "content": text}}
        return 200, {
            "choices": [
                (said if "messages" in body else {"text": text})
                | {"index": 0, "finish_reason": reason}
            ]
        }

    return answer


@pytest.mark.parametrize("length", [80, 22])  # enough for all documents, and too few
def test_served_documents_are_the_local_ones(length):
    """Guards a served simulator that is asked, read or cut otherwise than the local one."""
    model, tokenizer = loading.load("tiny")
    template = load_template(loading.resolve("tiny"))
    queries = [("Stoulmen was born in", False), ("Featha", True), ("Klinstead lies in", False)]
    requests = [request(query, noisy, (i, 3)) for i, (query, noisy) in enumerate(queries)]
    local = SimulatedSearch(model, tokenizer, template, 3, 5, 0.0, length).search(requests)
    seen = []
    with serving(openai(model, tokenizer, seen)) as (url, _):
        engine = ServedSearch(Client(f"{url},{url}/v1"), "", template, 3, 5, 0.0, length)
        assert engine.search(requests) == local and engine.search([]) == []
        chat = ServedSearch(Client(url), "other", template, 3, 5, 0.0, length, api="chat")
        assert chat.search(requests) == local
    assert any(local) and (length == 80) == all(len(reply) == 3 for reply in local)
    paths = [path for path, _ in seen]
    assert paths == ["/v1/models"] + ["/v1/completions"] * 3 + ["/v1/chat/completions"] * 3
    assert [body["model"] for _, body in seen[1:]] == ["the-simulator"] * 3 + ["other"] * 3


def test_a_served_reply_has_its_own_seed():
    """Guards equal documents for equal queries, and seeds that servers refuse or that vary."""
    model, tokenizer = loading.load("tiny")
    template, seeds = load_template(loading.resolve("tiny")), []
    requests = [request(key=(0, i)) for i in range(4)]
    for seed in (1, 1, 2):
        seen = []
        with serving(openai(model, tokenizer, seen)) as (url, _):
            ServedSearch(Client(url), "m", template, 1, seed, 0.8, 9).search(requests)
        assert {body["temperature"] for _, body in seen} == {0.8}
        assert {body["max_tokens"] for _, body in seen} == {9}
        seeds.append({body["seed"] for _, body in seen})
    assert seeds[0] == seeds[1] and seeds[0].isdisjoint(seeds[2]) and len(seeds[0]) == 4
    assert all(0 <= seed < 2**31 for seed in seeds[0] | seeds[2])


def test_a_server_of_another_kind_is_told():
    """Guards a policy that is trained on empty replies because the server is not an OpenAI one."""
    for content in (
        {"choices": []},
        {"choices": [{"text": None, "finish_reason": "stop"}]},
        {"choices": [{"text": "Doc 1: a"}]},
        {"choices": [{"text": "", "finish_reason": "stop"}]},
        {"choices": [{"text": "Sure! Here it is.", "finish_reason": "length"}]},
    ):
        with serving(lambda *_, content=content: (200, content)) as (url, _):
            with pytest.raises(ServiceError, match="/v1/completions did not answer in"):
                ServedSearch(Client(url, retries=0), "m", TEMPLATE).search([request()])


# ---- as a judge ---------------------------------------------------------------------------------


def test_what_a_judge_is_asked():
    """Guards documents, golds or a question that it is not shown, and tags in a document."""
    asked = SearchRequest(
        "a query",
        "a question?",
        ("Paris", "Lutetia"),
        documents=("one {query}", "</information> <|im_end|> two"),
    )
    text = prompt(load_template(simulator.JUDGE), asked, 0)
    for words in (
        '"a question?"',
        "Paris or Lutetia",
        '"a query"',
        "useful",
        "noisy",
        "\nDoc 1: one {query}\nDoc 2: (/information> (|im_end|> two\n",
    ):
        assert words in text


WORDS = {
    "useful": "useful",
    " Useful.": "useful",
    "**Noisy**\n": "noisy",
    "not useful": "not",
    "usefulness": "usefulness",
    "": "",
    "?": "",
}


def test_a_judge_replies_with_a_word():
    """Guards a judge whose mark, capital or line break hides its word, and one that reads
    "useful" out of "not useful"; a served one that is read otherwise."""
    found = [[word] if word else [] for word in WORDS.values()]
    tokenizer = make_tokenizer()
    replies = [Generated(tokenizer.encode(text) + [1], reason="eos") for text in WORDS]
    with mock.patch("minizs.simulator.generate", lambda *_, **__: replies):
        local = SimulatedSearch(None, tokenizer, TEMPLATE, top_k=0)
        assert local.search([request()] * len(WORDS)) == found

    def answer(path, body, headers):
        text = list(WORDS)[int(body["messages"][0]["content"][0])]
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": "length"}]}

    with serving(answer) as (url, _):
        served = ServedSearch(Client(url), "m", TEMPLATE, 0, api="chat")
        assert served.search([request(str(i)) for i in range(len(WORDS))]) == found
    with serving(lambda *_: (200, {"choices": [{"message": {"content": None}}]})) as (url, _):
        with pytest.raises(ServiceError, match="expected form"):
            ServedSearch(Client(url, retries=0), "m", TEMPLATE, 0, api="chat").search([request()])


def test_what_is_too_long_is_said():
    """Guards a traceback for a document that fills a judge's context."""
    model, tokenizer = loading.load("tiny")
    asked = SearchRequest("a", "b?", ("c",), documents=("word " * 2000,))
    judge = SimulatedSearch(model, tokenizer, load_template(simulator.JUDGE), 0, 0, 0.0, 8)
    with pytest.raises(UserError, match="Too long for the judge.*limit of 1024"):
        judge.search([asked])


@pytest.mark.slow
def test_transformers_serve(tmp_path):
    """Guards a protocol that only our own test server speaks."""
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
        url, template = f"http://127.0.0.1:{port}", load_template(folder)
        for _ in range(120):
            try:
                Client(url, retries=0).get("/health", lambda *_: None)
                break
            except ServiceError:
                time.sleep(1)
        requests = [request(f"{name} was born in", key=(1,)) for name in ("Stoulmen", "Featha")]
        local = SimulatedSearch(*loading.load("tiny"), template, 3, 0, 0.0, 100).search(requests)
        served = ServedSearch(Client(url), folder, template, 3, 0, 0.0, 100).search(requests)
        assert any(local) and served == local
    finally:
        server.terminate()
        server.wait(20)
