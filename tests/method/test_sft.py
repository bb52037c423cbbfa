"""Supervised fine-tuning: texts to tokens, batches, and the loss."""

import random

import pytest
import torch
from conftest import VOCAB, make_model, make_tokenizer, with_bos

from minizs import logprobs, sft


def make_texts(n: int = 5, seed: int = 0) -> list[sft.Tokens]:
    rng = random.Random(seed)
    lengths = [rng.randint(3, 12) for _ in range(n)]
    return [
        ([rng.randrange(VOCAB) for _ in range(k)], [0, *(rng.randint(0, 1) for _ in range(k - 1))])
        for k in lengths
    ]


def test_encode_marks_pieces_and_keeps_their_ids():
    """Segments are tokenised one by one, as a rollout appends them, and do not merge."""
    tokenizer = make_tokenizer(("ab",))
    ids, mask = sft.encode(tokenizer, [("xa", False), ("by", True), ("z", False)], end=True)
    assert tokenizer.convert_ids_to_tokens(ids) == ["x", "a", "b", "y", "z", "<eos>"]
    assert mask == [0, 0, 1, 1, 0, 1]
    assert sft.encode(tokenizer, [("xa", True)]) == (ids[:2], [1, 1])


def test_only_the_opening_piece_gets_a_bos():
    """A text is opened as a prompt is in use, and only once."""
    tokenizer = with_bos(make_tokenizer())
    ids, mask = sft.encode(tokenizer, [("x", False), ("y", True)])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<eos>", "x", "y"]
    assert mask == [0, 0, 1]


def test_batches_hold_every_text_once_within_the_budget():
    """An epoch holds each text once, in batches within the budget and in random order."""
    texts = make_texts(50)
    batches = list(sft.batches(iter(texts), 40, random.Random(0), pool=20))
    assert sorted(t for batch in batches for t in batch) == sorted(texts)
    widths = [max(len(ids) for ids, _ in batch) for batch in batches]
    assert all(len(batch) * width <= 40 for batch, width in zip(batches, widths, strict=True))
    assert widths != sorted(widths, reverse=True)
    assert batches != list(sft.batches(iter(texts), 40, random.Random(1), pool=20))


def test_nll_against_loops():
    """The loss is the sum over marked tokens, computed one by one; padding and first tokens do not
    count."""
    model = make_model()
    texts = make_texts()
    loss, count = sft.nll(model, *sft.collate(texts))
    expected = 0.0
    for ids, mask in texts:
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected -= sum(logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])
    assert count == sum(sum(mask) for _, mask in texts)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_head_in_chunks_gives_the_same_loss_and_gradients(monkeypatch):
    """With a large vocabulary only some tokens go through the head at once; and where none is
    marked the loss is 0."""
    texts = make_texts()
    results = []
    for positions in (10**6, 3):
        monkeypatch.setattr(logprobs, "LOGITS", {"cpu": positions * VOCAB})
        model = make_model(dtype=torch.float64)
        sizes = []
        hook = model.lm_head.register_forward_hook(lambda *call: sizes.append(len(call[2])))  # noqa: B023
        loss, count = sft.nll(model, *sft.collate(texts))
        hook.remove()
        loss.backward()
        assert sum(sizes) == count and max(sizes) == min(positions, count)
        results.append((loss, [weight.grad for weight in model.parameters()]))
        ids, attention_mask, mask = sft.collate(texts)
        assert sft.nll(model, ids, attention_mask, torch.zeros_like(mask)) == (0, 0)
    torch.testing.assert_close(*results)


def test_training_lowers_the_loss():
    """The gradient reaches the model."""
    model = make_model()
    batch = sft.collate(make_texts())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss, count = sft.nll(model, *batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
