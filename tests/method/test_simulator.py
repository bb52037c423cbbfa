"""The simulated search engine: its prompt, its training texts, its replies."""

from unittest import mock

import pytest
import torch
from conftest import make_model, make_tokenizer, with_bos

from minizs import UserError, simulator
from minizs.generate import Generated, generate
from minizs.models import loading
from minizs.protocol import number_documents
from minizs.sft import encode
from minizs.simulator import (
    GOLDS_SHOWN,
    SimulatedSearch,
    fill_template,
    load_template,
    training_text,
    write_replies,
)
from minizs.trajectory import SearchRequest

PROMPT = load_template("tuned")
TEMPLATE = "{query}|{question}|{answers}|{quality}|{top_k}:\n"


def request(query="a query", noisy=False, key=(0,), answers=("Paris", "Lutetia")):
    return SearchRequest(query, "a question?", answers, noisy, key)


# ---- the prompt ---------------------------------------------------------------------------------


def test_one_word_makes_the_difference():
    """The prompts for useful and noisy documents differ in that word and nothing else (Table 2)."""
    useful, noisy = (fill_template(PROMPT, request(noisy=noisy), 3) for noisy in (False, True))
    assert useful != noisy and useful.replace("useful", "noisy") == noisy
    assert "a query" in useful and "a question?" in useful and "{" not in useful


def test_gold_answers_are_named():
    """All of a few gold answers reach the simulator, and the first of hundreds."""
    text = fill_template(TEMPLATE, request(), 3)
    assert text == "a query|a question?|Paris or Lutetia|useful|3:\n"
    names = tuple(f"alias {number}" for number in range(400))
    text = fill_template("{query} {answers}", request(answers=names), 3)
    assert text == "a query " + " or ".join(names[:GOLDS_SHOWN])


def test_the_number_of_documents_is_the_one_asked_for():
    """The prompt asks for as many documents as are wanted."""
    assert "write 7 useful documents" in fill_template(PROMPT, request(), 7)


def test_a_query_cannot_fill_in_the_answer():
    """A policy that searches for "{answers}" is not shown the gold answer."""
    template, query = "{query}\n{answers}", "{answers} {quality}"
    assert fill_template(template, request(query), 3) == query + "\nParis or Lutetia"


def test_the_wording_travels_with_the_model(tmp_path):
    """A simulator is asked with the wording that it was trained with."""
    assert load_template(tmp_path) == PROMPT
    (tmp_path / simulator.PROMPT_FILE).write_text(TEMPLATE)
    assert load_template(tmp_path) == load_template(tmp_path / simulator.PROMPT_FILE) == TEMPLATE
    assert load_template("no-one/has-this-model") == PROMPT


def test_a_gguf_file_has_no_wording(tmp_path):
    """It is a model: its simulator gets the shipped wording."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert load_template(path) == load_template("tuned")


def test_a_template_without_a_query_is_refused(tmp_path):
    """Another file that is given for a template is told in a sentence."""
    (tmp_path / "other.txt").write_text("{question}")
    with pytest.raises(UserError, match="other.txt is no simulator's prompt"):
        load_template(tmp_path / "other.txt")


def test_an_untuned_model_is_shown_both_kinds():
    """Its prompt shows an example of each kind, which the request's own word does not change."""
    useful, noisy = (
        fill_template(load_template("untuned"), request(noisy=n), 4) for n in (False, True)
    )
    for text, word in ((useful, "useful"), (noisy, "noisy")):
        assert f"Now write 4 documents of {word} information." in text
        assert text.endswith(
            f'"a question?", whose answer is Paris or Lutetia.\nQuery: a query\n{word} output:\n'
        )
        assert "{" not in text
    example = useful.split("Now write")[0]
    assert noisy.startswith(example) and "useful output" in example and "noisy output" in example
    parts = example.split("noisy output:")
    assert "Danube" in parts[0].split("useful output:")[1] and "Danube" not in parts[1]


# ---- training -----------------------------------------------------------------------------------


def test_the_loss_is_on_the_documents_and_eos_alone():
    """The simulator learns to write documents and then to stop, and does not learn its prompt."""
    tokenizer = make_tokenizer()
    documents = ["one", "two"]
    ids, mask = encode(tokenizer, training_text(TEMPLATE, request(), documents), end=True)
    marked = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(marked) == number_documents(documents) + "<eos>"
    assert mask == sorted(mask)  # one stretch, at the end


def test_training_starts_with_the_ids_of_use():
    """In use the prompt has the ids that it had in training, opening token included."""
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
    """The requests of a turn are generated together, and each gets its own documents."""
    tokenizer = make_tokenizer()
    calls = []

    def answer(model, prompts, max_new_tokens, **options):
        calls.append(options)
        texts = [tokenizer.decode(p) for p in prompts]
        replies = [number_documents([f"on {text[0]}", "x", "", "y", "z"]) for text in texts]
        return [Generated(tokenizer.encode(reply) + [1], reason="eos") for reply in replies]

    engine = SimulatedSearch(None, tokenizer, TEMPLATE, top_k=3, seed=4, temperature=0.8)
    with mock.patch("minizs.simulator.generate", answer):
        replies = engine.search([request("a", key=(1, 2)), request("b", key=(3, 4))])
        assert engine.search([]) == []
    assert replies == [["on a", "x", "y"], ["on b", "x", "y"]]
    assert len(calls) == 1
    assert calls[0]["keys"] == [(1, 2), (3, 4)]
    assert (calls[0]["seed"], calls[0]["temperature"]) == (4, 0.8)


def test_a_half_written_document_is_not_passed_on():
    """A document that breaks off is left out: nobody can tell what it would have said."""
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
    """A request gets the same documents in any batch, and so with any number of processes."""
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


def answering(*texts: str, reason="eos"):
    """A patch with which the model writes these texts, whatever it is asked."""
    tokenizer = make_tokenizer()
    replies = [Generated(tokenizer.encode(text) + [1], reason=reason) for text in texts]
    return mock.patch("minizs.simulator.generate", lambda *_, **__: replies)


@pytest.mark.parametrize(
    "text, documents",
    [
        ("<think>Doc 1: a draft</think>\nDoc 1: a fact", ["a fact"]),
        ("a thought </think> Doc 1: a fact", ["a fact"]),
        ("<think>a</think><think>b</think> **Doc 1**: a fact", ["a fact"]),
        ("<think>Doc 1: a draft", []),
        ("<think>a</think> Doc 1: x <think> Doc 1: y", []),
    ],
)
def test_thoughts_are_no_documents(text, documents):
    """Only what stands behind the last thought counts. A thought without an end is a failure."""
    engine = SimulatedSearch(None, make_tokenizer(), TEMPLATE)
    with answering(text):
        assert engine.search([request()]) == [documents]
    assert engine.failed == (not documents)


@pytest.mark.parametrize("tags", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_the_tags_of_a_thought_may_be_special_tokens(tags):
    """Special tokens are no words of a document, but those of a thought still bound it."""
    names = [*tags, "<mark>"]
    tokenizer = make_tokenizer(tuple(names))
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    texts = [tags[0], "Doc 1: a draft", tags[1], "Doc 1: a", "<mark>", "fact", "<eos>"]
    ids = [i for text in texts for i in tokenizer.encode(text)]
    engine = SimulatedSearch(None, tokenizer, TEMPLATE)
    with mock.patch("minizs.simulator.generate", lambda *_, **__: [Generated(ids, reason="eos")]):
        assert engine.search([request()]) == [["afact"]]


def test_replies_without_documents_are_counted():
    """They are empty ones. Where most of the latest are so, a run that is to stop does."""
    replies = ["I cannot do that."] * 20 + ["Doc 1: a fact"] * 4
    requests = [request()] * len(replies)
    engine = SimulatedSearch(None, make_tokenizer(), TEMPLATE)
    with answering(*replies):
        assert engine.search(requests) == [[]] * 20 + [["a fact"]] * 4
    assert engine.failed == 20
    engine = SimulatedSearch(None, make_tokenizer(), TEMPLATE, on_error="stop")
    with answering(*replies), pytest.raises(UserError, match="20 of .* last 24 .*'I cannot do"):
        engine.search(requests)
    with answering("I cannot do that."):  # one failure does not stop a run
        assert SimulatedSearch(None, make_tokenizer(), TEMPLATE, on_error="stop").search(
            [request()]
        ) == [[]]


def test_a_prompt_without_room_is_told():
    """A prompt that the model has no positions for is refused in a sentence."""
    model, tokenizer = loading.load_model("tiny")
    with pytest.raises(UserError, match="Too long for the judge.*limit of 1024"):
        write_replies(model, tokenizer, ["word " * 2000], max_new_tokens=8)
