"""The tiny base: the texts it learns from, its tokenizer, and `main(argv)`, which makes it."""

import hashlib
from itertools import islice

import pytest
import torch
from scripts import weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import tiny_base as base
from minizs import UserError, sft
from minizs.models import loading
from minizs.world.facts import read_fact

TINY = "--steps 2 --hidden 16 --layers 1 --batch_tokens 200 --threads 1".split()


@pytest.fixture(scope="module")
def texts():
    """The first texts of a training, its share rising from 0 to 1 over 600 of them."""
    seen = []
    for text in islice(base.stream(0, lambda: len(seen) / 600), 600):
        seen.append(text)
    return seen


def test_the_texts_of_a_seed_stay_the_same(texts):
    """The shipped model can be made again: the stream of its texts is the one it learned from."""
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()
    assert digest[:16] == "caa6ec927e966432"
    assert [*islice(base.stream(1, lambda: 0.5), 9)] != [*islice(base.stream(0, lambda: 0.5), 9)]


def test_every_word_is_known(texts):
    """No text has a word that the tokenizer does not know."""
    tokenizer = base.make_tokenizer()
    for segments, end in texts:
        ids, mask = sft.encode(tokenizer, segments, end)
        assert tokenizer.unk_token_id not in ids and any(mask)
        assert (ids[-1] == tokenizer.eos_token_id) == end


def test_the_shipped_tokenizer_is_this_one():
    """The shipped model knows the words of this world."""
    shipped = AutoTokenizer.from_pretrained(loading.TINY_BASE)
    assert shipped.get_vocab() == base.make_tokenizer().get_vocab()


def test_the_loss_is_on_what_a_model_writes(texts):
    """Documents and prompts, which a model reads, have no loss."""
    documents = {"<information>": 0, "Question:": 0, "Query:": 0}
    for segments, _ in texts:
        for text, marked in segments:
            for start in documents:
                if text.strip().startswith(start):
                    documents[start] += 1
                    assert not marked
    assert min(documents.values()) > 20


def test_a_block_gives_the_facts_that_it_shows():
    """The facts of a block are those that its documents state."""
    documents = ["Ann Bee was born in Rome", "no fact"]
    (text, marked), facts = base.block(documents)
    assert all(document in text for document in documents) and not marked
    assert facts == [read_fact(documents[0])] == [("Ann Bee", "born_in", "Rome")]


def test_it_leaves_a_model_with_both_prompts(work):
    """It leaves a model that both scripts can start from; the seed decides its weights."""
    for folder, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        base.main([*TINY, "--output", folder, "--seed", seed])
    assert weights(work / "one") == weights(work / "same") != weights(work / "other")
    assert (work / "one" / "prompt.txt").read_text() == base.PROMPT
    assert (work / "one" / "simulator_prompt.txt").read_text() == base.SIMULATOR_PROMPT
    base.main([*TINY, "--output", "one", "--seed", "2", "--overwrite"])
    assert weights(work / "one") == weights(work / "other")
    model = AutoModelForCausalLM.from_pretrained(work / "one")
    tokenizer = AutoTokenizer.from_pretrained(work / "one")
    logits = model(torch.tensor([tokenizer("Question: ?")["input_ids"]])).logits
    assert logits.isfinite().all() and logits.shape[-1] == len(tokenizer)


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.2, 0.6, 1.0])
def test_the_mixture_never_runs_dry(progress):
    """At each stage of the training the shares of the kinds of text add up to 1."""
    shares = base.mixture(progress).values()
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--stepz 5", "--stepz"),
        ("--steps 0", "--steps"),
        ("--hidden 12", "--hidden"),
        ("--batch_tokens 0", "--batch_tokens"),
        ("--output ../base", "not empty"),
    ],
)
def test_bad_input_is_refused(work, flags, names):
    """Bad input is one sentence that names the flag."""
    with pytest.raises(UserError, match=names):
        base.main([*TINY, *flags.split()])
    assert not list(work.iterdir())
