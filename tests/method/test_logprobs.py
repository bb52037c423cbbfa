"""Log-probabilities of given tokens against the plain computation over all logits."""

import pytest
import torch
from conftest import FAMILIES, VOCAB, make_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import minizs.logprobs
from minizs.logprobs import Scorer, score, token_logprobs

LENGTHS = (11, 7, 4)


def make_batch(side: str = "right"):
    """Three sequences with holes in the loss mask, padded on the given side: (3, 11) each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (3, max(LENGTHS)), generator=generator)
    loss = torch.randint(0, 2, ids.shape, generator=generator)
    loss[:, 0] = 0
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids, loss = ids.where(real, 0), loss.where(real, 0)
    if side == "left":
        moved = [
            torch.stack([row.roll(len(row) - n) for row, n in zip(t, LENGTHS, strict=True)])
            for t in (ids, real.long(), loss)
        ]
        return moved
    return ids, real.long(), loss


def plain(model, ids, attention, loss, temperature=1.0, vocab_size=None):
    """The same from the model's own logits, (B, T, V), with the library's own positions."""
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1, :vocab_size]
    logp = (logits.float() / temperature).log_softmax(-1)
    targets = ids[:, 1:].clamp(max=logp.shape[-1] - 1)
    chosen = logp.gather(-1, targets[..., None]).squeeze(-1) * loss[:, 1:]
    entropy = -(logp.exp() * logp).sum(-1) * loss[:, 1:]
    return nn.functional.pad(chosen, (1, 0)), nn.functional.pad(entropy, (1, 0))


@pytest.mark.parametrize("temperature, vocab_size", [(1.0, None), (0.7, 90)])
def test_equals_plain_log_softmax(family, temperature, vocab_size, monkeypatch):
    """Log-probabilities and entropies are those of full logits, whatever the chunks."""
    monkeypatch.setattr(minizs.logprobs, "CHUNK", 4)
    model = make_model(family)
    ids, attention, loss = make_batch()
    ids = ids.clamp(max=89)
    expected = plain(model, ids, attention, loss, temperature, vocab_size)
    actual = score(model, ids, attention, loss, temperature, vocab_size)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == ids.shape and a.dtype == torch.float32
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)
    single = token_logprobs(model, ids, attention, loss, temperature, vocab_size)
    assert torch.equal(single, actual[0])


def test_gradient_equals_plain_gradient(monkeypatch):
    """Gradients of all parameters are those of full logits: checkpointing loses none."""
    monkeypatch.setitem(minizs.logprobs.LOGITS, "cpu", 5 * VOCAB - 1)
    model = make_model()
    batch = make_batch()
    weights = torch.rand(batch[0].shape)
    gradients = []
    for function in (score, plain):
        model.zero_grad()
        logprobs, entropy = function(model, *batch)
        ((logprobs + 0.1 * entropy) * weights).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_padding_side_does_not_matter(family):
    """Padding changes nothing on either side: positions are counted from the first real token.

    Rotary positions are relative and forgive it; GPT-2's are absolute and do not.
    """
    if family == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        model = GPT2LMHeadModel(config).eval()
        torch.nn.init.normal_(model.transformer.wpe.weight)
    else:
        model = make_model(family)
    left, right = make_batch("left"), make_batch("right")
    a, b = (score(model, *batch) for batch in (left, right))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x[left[2] == 1], y[right[2] == 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_vocabulary_sums_to_one(dtype):
    """Ids that only pad the embedding have no part in the softmax, which is float32: in bfloat16
    it would be wrong by a percent."""
    model = make_model(dtype=dtype)
    ids = torch.arange(90)[:, None].repeat(1, 2)
    ids[:, 0] = 5  # one context, every possible next token
    ones = torch.ones_like(ids)
    loss = torch.tensor([0, 1]).expand_as(ids)
    logprobs = token_logprobs(model, ids, ones, loss, vocab_size=90)
    assert logprobs[:, 1].exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_head_sees_only_scored_positions():
    """The head runs on the tokens of the loss alone, not on prompts, documents or padding."""
    model = make_model()
    ids, attention, loss = make_batch()
    rows = []
    model.lm_head.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    with torch.no_grad():
        token_logprobs(model, ids, attention, loss)
    assert sum(rows) == loss.sum().item()


def test_replaced_head_is_called():
    """The head is called as a module, so that an adapter or a new head has its effect."""

    class Shifted(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head
            self.shift = nn.Parameter(torch.linspace(-3, 3, VOCAB))

        def forward(self, hidden):
            return self.head(hidden) + self.shift

    model = make_model()
    batch = make_batch()
    before = token_logprobs(model, *batch)
    model.lm_head = Shifted(model.lm_head)
    after = token_logprobs(model, *batch)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, plain(model, *batch)[0], atol=1e-5, rtol=1e-5)


def test_nothing_to_score_still_gives_gradients():
    """Without a policy token all gradients are there and 0, or other DDP processes would wait."""
    model = make_model()
    ids, attention, loss = make_batch()
    logprobs, entropy = Scorer(model)(ids, attention, torch.zeros_like(loss))
    assert not logprobs.any() and not entropy.any()
    (logprobs.sum() + entropy.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_scorer_names_the_layers_to_shard():
    """FSDP2 finds the layers to shard inside the wrapper."""
    assert "LlamaDecoderLayer" in Scorer(make_model())._no_split_modules


def test_refusals():
    """A first token, which nothing precedes, cannot be scored."""
    model = make_model()
    ids, attention, loss = make_batch()
    with pytest.raises(ValueError, match="first token"):
        token_logprobs(model, ids, attention, torch.ones_like(loss))
