"""Packed (padding-free) forwards against padded ones: the same numbers, no neighbour in sight."""

import pytest
import torch
from conftest import VOCAB, make_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import is_flash_attn_2_available

from minizs import ppo, sft
from minizs.logprobs import Scorer, score
from minizs.models import flash, weights
from minizs.models.batches import attention, pad

LENGTHS = (11, 1, 7, 4)  # one has nothing to score


def make_batch(side: str = "right", seed: int = 0) -> list[torch.Tensor]:
    """input_ids, attention_mask, loss_mask: (4, 11) each, the loss mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, 90, (n,), generator=generator).tolist() for n in LENGTHS]
    loss = [[0, *torch.randint(0, 2, (n - 1,), generator=generator).tolist()] for n in LENGTHS]
    batch = [pad(ids), attention(list(LENGTHS)), pad(loss)]
    if side == "right":
        return batch
    shifts = [max(LENGTHS) - n for n in LENGTHS]
    return [torch.stack([r.roll(k) for r, k in zip(t, shifts, strict=True)]) for t in batch]


def make_gpt2() -> GPT2LMHeadModel:
    """Its positions are learned and absolute: rotary ones are relative and forgive a shift."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight)
    return model


def make(family: str):
    """In float64, so that what differs is no rounding."""
    if family == "gpt2":
        return make_gpt2().double()
    if family == "window":  # shorter than the longest sequence
        window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        return make_model("qwen2", torch.float64, **window)
    return make_model(family, torch.float64)


def outputs_and_gradients(module, inputs, seed: int = 1):
    """What a module returns, and the gradients of a random weighting of it."""
    module.zero_grad()
    outputs = module(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    loss = sum((out * torch.rand(out.shape, generator=generator)).sum() for out in outputs)
    loss.backward()
    return [out.detach() for out in outputs], [p.grad.clone() for p in module.parameters()]


def assert_equal_packed_and_padded(make_module, inputs):
    padded, packed = (outputs_and_gradients(make_module(flag), inputs) for flag in (False, True))
    for a, b in zip(padded[0] + padded[1], packed[0] + packed[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert any(gradient.abs().max() > 0.01 for gradient in packed[1])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "window"])
def test_the_scorer_packed_equals_padded(family, side):
    """Packed sequences score as padded ones do: positions start anew, targets are their own."""
    model = make(family)
    batch = make_batch(side)
    options = {"temperature": 0.7, "vocab_size": 90}
    assert_equal_packed_and_padded(lambda flag: Scorer(model, packed=flag, **options), batch)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_critic_packed_equals_padded(family, side):
    """The critic's values are those of padded rows: a first token has none of its neighbour's."""
    backbone = make(family).base_model
    ids, mask, _ = make_batch(side)

    def make_critic(packed):
        critic = ppo.Critic(backbone, packed).double()
        torch.manual_seed(0)
        torch.nn.init.normal_(critic.head.weight)
        return critic

    assert_equal_packed_and_padded(make_critic, (ids, mask))
    values = make_critic(True)(ids, mask)
    firsts = mask.cumsum(-1) == 1
    assert not values[firsts & (mask == 1)].any() and not values[mask == 0].any()
    assert values[(mask == 1) & ~firsts].all()


def test_supervised_packed_equals_padded():
    """Stage 1 has the same loss on the same tokens, packed or padded."""
    model = make_model(dtype=torch.float64)
    ids, mask, loss_mask = make_batch()
    loss_mask[:, 0] = 1  # a text may be marked from its first token on, which is not predicted
    losses = []
    for packed in (False, True):
        model.zero_grad()
        loss, count = sft.Supervised(model, packed=packed)(ids, mask, loss_mask)
        loss.backward()
        losses.append([loss.detach(), count, *(p.grad.clone() for p in model.parameters())])
    assert losses[0][1] == losses[1][1] == loss_mask[:, 1:].sum()
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_sequence_cannot_see_its_neighbours(family):
    """A sequence is the same bit for bit, whatever stands in the others."""
    model = make(family)
    ids, mask, loss_mask = make_batch()
    for row in range(len(ids)):
        others = torch.arange(len(ids)) != row
        changed = ids.clone()
        changed[others] = (ids[others] + 40) % 90
        before, after = (score(model, x, mask, loss_mask, packed=True)[0] for x in (ids, changed))
        assert torch.equal(before[row], after[row])
        if loss_mask[others].any():
            assert not torch.equal(before[others], after[others])


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_restart_and_no_padding_is_computed(side):
    """Positions start from 0 in each sequence, and padding is not computed."""
    model = make_model()
    seen = []
    model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given), with_kwargs=True
    )
    score(model, *make_batch(side), packed=True)
    expected = [p for n in LENGTHS for p in range(n)]
    assert seen[0]["position_ids"].tolist() == [expected]
    assert seen[0]["input_ids"].shape == (1, sum(LENGTHS))
    assert seen[0].get("attention_mask") is None  # flash attention would unpad with it


@pytest.mark.parametrize("lengths", [LENGTHS, (5,), (1,), (1, 1)])
def test_nothing_to_score_still_gives_gradients(lengths):
    """Without a policy token all gradients are there and 0, or other DDP processes would wait."""
    model = make_model()
    ids = pad([[5] * n for n in lengths])
    inputs = ids, attention(list(lengths)), torch.zeros_like(ids)
    logprobs, entropy = Scorer(model, packed=True)(*inputs)
    assert not logprobs.any() and not entropy.any()
    (logprobs.sum() + entropy.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_nothing_precedes_is_refused(side):
    """A first token, after padding or after another sequence, is refused."""
    model = make_model()
    ids, mask, _ = make_batch(side)
    for wrong in ((mask == 1) & (mask.cumsum(-1) == 1), mask == 0):
        for packed in (False, True):
            with pytest.raises(ValueError, match="first token"):
                score(model, ids, mask, wrong, packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointed_layers_give_the_same_gradients(packed):
    """Gradient checkpointing happens, and train mode brings no dropout."""
    model = make_model(attention_dropout=0.5)
    batch = make_batch()
    scorer = Scorer(model, packed=packed)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = outputs_and_gradients(scorer, batch)
    assert len(calls) == 1
    weights.checkpoint_layers(model)
    actual = outputs_and_gradients(scorer, batch)
    assert len(calls) == 3  # once more forward, once again in backward
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
def test_flash_attention_packed_equals_padded_sdpa():
    """The real kernel gives the same numbers but for bfloat16's rounding, and sees no neighbour."""
    model = weights.cast_weights(make_model(num_attention_heads=4, head_dim=32), torch.bfloat16)
    model, batch = model.cuda(), [t.cuda() for t in make_batch()]
    gradients = []
    for kind, packed in (("sdpa", False), ("flash_attention_2", True)):
        model.set_attn_implementation(kind)
        model.zero_grad()
        logprobs, entropy = score(model, *batch, packed=packed)
        (logprobs + 0.1 * entropy).sum().backward()
        gradients.append((logprobs, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (a, ga), (b, gb) = gradients
    assert (a - b).abs().max() < 0.3 and (a - b).abs().mean() < 0.03
    assert torch.nn.functional.cosine_similarity(ga.float(), gb.float(), dim=0) > 0.99
    changed = batch[0].clone()
    changed[1:] = (changed[1:] + 40) % 90
    assert torch.equal(score(model, changed, *batch[1:], packed=True)[0][0], b[0])


@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_is_defined_by_a_mask(window):
    """No sequence sees another, nothing sees what is behind it, or what has left its window."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 9, 8, generator=generator) for h in (4, 2, 2))
    given = flash.packed_arguments([4, 5], torch.device("cpu"))
    output, _ = flash._attend_packed_plainly(
        None, query, key, value, sliding_window=window, **given
    )  # (1, R, H, D)
    for start, length in ((0, 4), (4, 5)):
        for t in range(length):
            first = start + max(0, t + 1 - (window or length))
            seen = slice(first, start + t + 1)
            for head in range(4):
                q, k, v = query[0, head, start + t], key[0, head // 2, seen], value[0, head // 2]
                weights = (k @ q / 8**0.5).softmax(0)
                expected = weights @ v[seen]
                torch.testing.assert_close(output[0, start + t, head], expected)


def test_packed_attention_without_its_arguments_is_sdpa(monkeypatch):
    """A model that is set to it can be run on a padded batch as well."""
    model = make_model(dtype=torch.float64)
    batch = make_batch("left")
    expected = score(model, *batch)
    model.set_attn_implementation(flash.PACKED)
    for a, b in zip(score(model, *batch), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_attention_gets_its_arguments_through_the_model(monkeypatch):
    """Every layer is told where sequences end; with the kernel's definition in its place, packed
    scores and gradients are those of a padded batch."""
    model = make_model(dtype=torch.float64)
    batch = make_batch()
    expected = outputs_and_gradients(Scorer(model), batch)
    monkeypatch.setattr(
        flash, "varlen_attn", lambda q, k, v, edges, *_, **__: plain_varlen(q, k, v, edges)
    )
    model.set_attn_implementation(flash.PACKED)
    actual = outputs_and_gradients(Scorer(model, packed=True), batch)
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        torch.testing.assert_close(a, b)


def plain_varlen(query, key, value, edges):
    """The kernel's interface, (R, H, D), with its definition behind it."""
    inputs = [x.transpose(0, 1)[None] for x in (query, key, value)]
    return flash._attend_packed_plainly(None, *inputs, edges)[0][0]


@pytest.mark.gpu
def test_pytorchs_packed_kernel_equals_padded_sdpa():
    """The same numbers to bfloat16's rounding, and no neighbour in sight."""
    model = weights.cast_weights(make_model(num_attention_heads=4, head_dim=32), torch.bfloat16)
    model, batch = model.cuda(), [t.cuda() for t in make_batch()]
    assert flash.can_pack(model, torch.bfloat16)
    results = []
    for kind, packed in (("sdpa", False), (flash.PACKED, True)):
        model.set_attn_implementation(kind)
        model.zero_grad()
        logprobs, entropy = score(model, *batch, packed=packed)
        (logprobs + 0.1 * entropy).sum().backward()
        results.append((logprobs, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (a, ga), (b, gb) = results
    assert (a - b).abs().max() < 0.3 and (a - b).abs().mean() < 0.03
    assert torch.nn.functional.cosine_similarity(ga.float(), gb.float(), dim=0) > 0.99
