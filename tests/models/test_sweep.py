"""Families of `transformers`, each against itself: see benchmarks/families.py."""

import pytest

from benchmarks import families

# One of each kind: plain, with windows, capped, scaled, with sinks, latent keys, learned positions,
# experts, shared keys and values.
WORKING = (
    *("llama", "gpt2", "opt", "gptj", "mistral", "gemma2", "gemma4_text", "cohere2", "granite"),
    *("hyperclovax", "gpt_oss", "deepseek_v3", "phi3", "qwen2", "mixtral", "minicpm3"),
)
REFUSED = {
    "bert": "makes its logits in a way of its own",
    "bloom": "no cache of rows fits it",
    "gpt_neo": "more than their window",
    "llama4_text": "chunked_attention",
    "mamba": "linear_attention",
    "rwkv": "rows of different lengths come out wrong",
    "xmod": "does not run on text alone",
}


@pytest.mark.parametrize("name", WORKING)
def test_a_family_is_computed_as_it_computes_itself(name):
    """Greedy tokens and log-probabilities are the model's own, far beyond its window."""
    outcome = families.try_family(name)
    assert outcome.works, outcome


@pytest.mark.parametrize("name, reason", REFUSED.items())
def test_a_family_that_would_be_wrong_is_refused_in_a_sentence(name, reason):
    """No traceback of the library's, and no wrong numbers."""
    outcome = families.try_family(name)
    assert " is not supported: " in outcome.refusal and reason in outcome.refusal


@pytest.mark.parametrize("name", ["gpt_neo", "moshi"])
def test_the_sweep_notices_windows_that_are_not_heeded(name, monkeypatch):
    """Families that are refused by name: without that, they would be computed wrongly."""
    monkeypatch.setattr(families, "row_limit", lambda _: 256)
    monkeypatch.setattr("minizs.generate.row_limit", lambda _: 256)
    assert families.try_family(name).errors


@pytest.mark.slow
def test_all_families_are_right_or_refused():
    """At least sixty work, and none is wrong; docs/models.md is what this finds."""
    outcomes = {name: families.try_family(name) for name in families.families()}
    assert not [name for name, outcome in outcomes.items() if outcome.errors]
    assert sum(outcome.works for outcome in outcomes.values()) >= 60
    assert families.TARGET.read_text(encoding="utf-8") == families.page(outcomes)
