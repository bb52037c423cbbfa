"""Supervised fine-tuning: the loss of a language model on the marked part of its texts.

Stage 1 trains the simulator with it (loss on the documents alone), and the tiny base is made with
it. A text is a list of (piece, marked) segments; pieces are tokenised one by one, exactly as a
rollout appends them, so that training and use see the same ids.
"""

import random
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from minizs.batching import attention, by_budget, pad

Segment = tuple[str, bool]  # some text, and whether the loss is on it
Tokens = tuple[list[int], list[int]]  # ids and mask, of equal lengths


def encode(tokenizer, segments: list[Segment], end: bool = False) -> Tokens:
    """Token ids of the whole text, and a mask that is 1 on the marked segments.

    With `end` the end-of-sequence token follows, marked: a model learns to stop.
    """
    ids, mask = [], []
    texts = [text for text, _ in segments]
    # Only what opens the text gets the tokenizer's own opening token, as a prompt does in use.
    pieces = [tokenizer(texts[0])["input_ids"]]
    if texts[1:]:
        pieces += tokenizer(texts[1:], add_special_tokens=False)["input_ids"]
    for piece, (_, marked) in zip(pieces, segments, strict=True):
        ids += piece
        mask += [int(marked)] * len(piece)
    if end:
        ids.append(tokenizer.eos_token_id)
        mask.append(1)
    return ids, mask


def batches(texts: Iterable[Tokens], tokens: int, rng: random.Random,
            pool: int = 1024) -> Iterator[list[Tokens]]:  # fmt: skip
    """Batches of at most `tokens` positions of texts of similar length, in random order.

    A small budget in tokens gives several times the optimiser steps a minute that padded batches of
    a fixed number of rows give.
    """
    texts = iter(texts)
    while buffer := list(islice(texts, pool)):
        groups = by_budget([len(ids) for ids, _ in buffer], tokens)
        rng.shuffle(groups)
        for group in groups:
            yield [buffer[i] for i in group]


def collate(rows: list[Tokens], device: torch.device | str = "cpu") -> list[Tensor]:
    """input_ids, attention_mask and loss_mask, each (B, T)."""
    ids, masks = zip(*rows, strict=True)
    return [t.to(device) for t in (pad(ids), attention(list(map(len, ids))), pad(masks))]


def nll(model, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor):
    """Summed negative log-likelihood of the marked tokens, and their number. All inputs (B, T)."""
    marked = loss_mask[:, 1:].bool()  # token t is predicted at t - 1
    hidden = model.get_decoder()(input_ids, attention_mask=attention_mask, use_cache=False)
    logits = model.get_output_embeddings()(hidden.last_hidden_state[:, :-1][marked]).float()
    return F.cross_entropy(logits, input_ids[:, 1:][marked], reduction="sum"), marked.sum()


class Supervised(torch.nn.Module):
    """`nll` as a module: what Accelerate prepares, so that its hooks see every forward."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor):
        return nll(self.model, input_ids, attention_mask, loss_mask)
