"""The model that writes: the trained one, or a copy of it that follows."""

import pytest
import torch
from conftest import EOS, make_model

from minizs.generate import generate
from minizs.models.weights import make_writer


def spoil(model) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))


def test_nothing_is_copied_where_nothing_differs():
    """A whole model in the format that is computed in generates itself, without a copy."""
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype=dtype)
        assert make_writer(model, dtype, "cpu")() is model


@pytest.mark.parametrize("sharded, dtype", [(False, torch.bfloat16), (True, torch.float32)])
def test_a_copy_follows_the_trained_weights(family, sharded, dtype):
    """Each call brings the copy up to date with the trained weights."""
    model = make_model(family, tie_word_embeddings=True)
    writer = make_writer(model, dtype, "cpu", sharded)
    for _ in range(2):
        copy = writer()
        assert copy is not model and copy is writer()  # made once
        pairs = list(zip(copy.named_parameters(), model.named_parameters(), strict=True))
        for (name, mine), (same, theirs) in pairs:
            assert name == same and mine.dtype == dtype and not mine.requires_grad
            assert torch.equal(mine, theirs.to(dtype)) and theirs.requires_grad
            assert mine.data_ptr() != theirs.data_ptr() and theirs.dtype == torch.float32
        assert copy.lm_head.weight is copy.model.embed_tokens.weight  # still tied
        spoil(model)
    [stale] = {torch.equal(a, b.to(dtype)) for (_, a), (_, b) in pairs}
    assert not stale  # until it is called again
    rotary = copy.model.rotary_emb.inv_freq
    assert torch.equal(rotary, model.model.rotary_emb.inv_freq) and rotary.dtype == torch.float32


def test_the_copy_writes_what_the_model_would():
    """The copy gives the model's own logits, in eval mode."""
    model = make_model(dtype=torch.float64)
    writer = make_writer(model, torch.float64, "cpu", sharded=True)
    for _ in range(2):
        own, copied = (generate(m, [[EOS, 5, 6]], 12, seed=3)[0] for m in (model, writer()))
        assert own.ids == copied.ids and own.logprobs == copied.logprobs
        spoil(model)
