"""Contrast: the formula, the twins of a row, and what it does to a simulator's words."""

import math

import pytest
import torch
from conftest import make_model, make_tokenizer

from minizs.contrast import POSSIBLE, contrast_distribution, generate_with_contrast
from minizs.simulator import SimulatedSearch
from minizs.trajectory import SearchRequest

PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
OTHERS = [[3, 4, 12, 6, 5], [13, 8], None]


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_a_token_loses_what_the_other_prompt_would_give_it():
    """Tokens that the other prompt makes rarer keep their shares; one that it makes likelier loses
    by the ratio: p_own * (p_own / p_other)^w."""
    own, other = log(0.4, 0.4, 0.2), log(0.1, 0.8, 0.1)
    expected = torch.tensor([0.4, 0.4 * (0.4 / 0.8) ** 3, 0.2], dtype=torch.float64)
    result = contrast_distribution(own, other, 3.0, 1.0).exp()[0]
    assert result.tolist() == pytest.approx((expected / expected.sum()).tolist())


def test_weight_and_temperature():
    """A weight of 0 changes nothing; equal prompts change nothing; heat is applied at the end."""
    own, other = log(0.5, 0.3, 0.2), log(0.1, 0.1, 0.8)
    assert torch.allclose(contrast_distribution(own, other, 0.0, 1.0), own)
    assert torch.allclose(contrast_distribution(own, own, 3.0, 1.0), own)
    cool = contrast_distribution(own, other, 1.0, 0.5)
    warm = contrast_distribution(own, other, 1.0, 1.0)
    assert torch.allclose(cool, torch.log_softmax(2 * warm, -1))


def test_what_is_hardly_possible_stays_impossible():
    """A token that its own prompt all but excludes is never drawn, however much rarer it is with
    the other prompt, or however much the others lose. Nothing becomes NaN."""
    own = log(1 - POSSIBLE / 2, POSSIBLE / 2)
    for other in (log(1 - 1e-30, 1e-30), log(1.0 - 1e-12, 1e-12)):
        assert contrast_distribution(own, other, 99.0, 1.0)[0].tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_gives_what_whole_texts_give(temperature):
    """Each token's log-probability is that of the formula on two plain forward passes over the two
    whole texts, or on one where there is no other; without heat it is the likeliest token."""
    model = make_model(dtype=torch.float64)
    results = generate_with_contrast(
        model, PROMPTS, 12, others=OTHERS, weight=1.5, temperature=temperature, eos_id=()
    )
    for prompt, other, result in zip(PROMPTS, OTHERS, results, strict=True):
        assert len(result.ids) == 12 and result.reason == "length"
        for place, (token, logprob) in enumerate(zip(result.ids, result.logprobs, strict=True)):
            text = result.ids[:place]
            with torch.no_grad():
                own, opposite = [
                    model(torch.tensor([start + text])).logits[:, -1].log_softmax(-1)
                    for start in (prompt, other or prompt)
                ]
            expected = own[0]
            if other:
                expected = contrast_distribution(own, opposite, 1.5, temperature)[0]
            assert logprob == pytest.approx(expected[token].item(), abs=1e-6)
            if temperature == 0:
                assert token == expected.argmax()


def test_a_row_does_not_depend_on_the_others():
    """A row alone writes what it writes among others, some of which stop before it."""
    model = make_model(dtype=torch.float64)
    settings = {"weight": 1.0, "seed": 5, "eos_id": (3, 4, 5, 6, 7, 8, 9)}
    together = generate_with_contrast(
        model, PROMPTS, 20, others=OTHERS, keys=[(1,), (2,), (3,)], **settings
    )
    alone = [
        generate_with_contrast(model, [prompt], 20, others=[other], keys=[(key,)], **settings)[0]
        for key, (prompt, other) in enumerate(zip(PROMPTS, OTHERS, strict=True), 1)
    ]
    assert [row.ids for row in together] == [row.ids for row in alone]
    assert len({len(row.ids) for row in together}) > 1


def test_a_simulator_is_contrasted_with_the_other_word():
    """The weight changes noisy replies where the prompt has a word of quality. Where it has none,
    both prompts are the same, and the weight changes nothing."""
    tokenizer = make_tokenizer(tuple(f"Doc {i}:" for i in range(40)))
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=512, dtype=torch.float64)
    requests = [SearchRequest(query, noisy=True, key=(1,)) for query in "abcd"]
    for template, has_word in (("{query} {quality}:", True), ("{query}:", False)):
        replies = []
        for weight in (1.0, 9.0):
            engine = SimulatedSearch(model, tokenizer, template, max_new_tokens=60, contrast=weight)
            replies.append(engine.search(requests))
            assert any(replies[-1]) and engine.search([]) == []
        assert (replies[0] != replies[1]) == has_word


def test_useful_replies_have_no_contrast():
    """Among noisy requests, a useful one gets what it gets without contrast."""
    tokenizer = make_tokenizer(tuple(f"Doc {i}:" for i in range(40)))
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=512, dtype=torch.float64)
    requests = [SearchRequest(query, noisy=query > "b", key=(1,)) for query in "abcd"]
    plain, contrasted = (
        SimulatedSearch(model, tokenizer, "{query}{quality}", max_new_tokens=60, contrast=weight)
        for weight in (0.0, 9.0)
    )
    replies, others = plain.search(requests), contrasted.search(requests)
    assert any(replies[:2]) and replies[:2] == others[:2] and replies[2:] != others[2:]
    assert contrasted.search(requests[:2]) == replies[:2]
