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
from minizs.simulator import SimulatedSearch, load_template, prompt, training_text
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
    "useful" out of "not useful"."""
    found = [[word] if word else [] for word in WORDS.values()]
    tokenizer = make_tokenizer()
    replies = [Generated(tokenizer.encode(text) + [1], reason="eos") for text in WORDS]
    with mock.patch("minizs.simulator.generate", lambda *_, **__: replies):
        local = SimulatedSearch(None, tokenizer, TEMPLATE, top_k=0)
        assert local.search([request()] * len(WORDS)) == found


def test_what_is_too_long_is_said():
    """Guards a traceback for a document that fills a judge's context."""
    model, tokenizer = loading.load_model("tiny")
    asked = SearchRequest("a", "b?", ("c",), documents=("word " * 2000,))
    judge = SimulatedSearch(model, tokenizer, load_template(simulator.JUDGE), 0, 0, 0.0, 8)
    with pytest.raises(UserError, match="Too long for the judge.*limit of 1024"):
        judge.search([asked])
