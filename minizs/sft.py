"""Supervised fine-tuning: the loss of a language model on the marked part of its texts.

A text is a list of segments, tokenised one by one, as a rollout appends them."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from minizs.logprobs import Scorer, predictable, states_before
from minizs.models.batches import attention, by_budget, pad
from minizs.protocol import prompt_ids, reply_ids

Segment = tuple[str, bool]  # some text, and whether the loss is on it
Tokens = tuple[list[int], list[int]]  # ids and mask, of equal lengths


def encode(tokenizer, segments: list[Segment], end: bool = False) -> Tokens:
    """Ids of the whole text, with `end` the end-of-sequence token too, and a mask that is 1 on
    the marked segments and on that token: a model learns to stop."""
    texts, marks = map(list, zip(*segments, strict=True))
    # Only what opens the text gets an opening token or a chat template, as a prompt does in use.
    pieces = [*prompt_ids(tokenizer, texts[:1]), *reply_ids(tokenizer, texts)[1:]]
    if end:
        pieces, marks = [*pieces, [tokenizer.eos_token_id]], [*marks, True]
    masks = [[int(marked)] * len(piece) for piece, marked in zip(pieces, marks, strict=True)]
    return list(chain(*pieces)), list(chain(*masks))


def batches(texts: Iterable[Tokens], tokens: int, rng: Random, pool: int = 1024) -> Iterator[list]:
    """Batches of at most `tokens` positions, of texts of similar length, in random order."""
    texts = iter(texts)
    while buffer := list(islice(texts, pool)):
        groups = by_budget([len(ids) for ids, _ in buffer], tokens)
        rng.shuffle(groups)
        yield from ([buffer[i] for i in group] for group in groups)


def collate(rows: list[Tokens], device: torch.device | str = "cpu") -> list[Tensor]:
    """input_ids, attention_mask and loss_mask, each (B, T)."""
    ids, masks = zip(*rows, strict=True)
    return [t.to(device) for t in (pad(ids), attention(list(map(len, ids))), pad(masks))]


def nll(model, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, packed: bool = False):
    """Summed negative log-likelihood of the marked tokens, and their number. All inputs (B, T). A
    text's first token, which nothing precedes, does not count. `packed`: see `states_before`."""
    marked = loss_mask.bool() & predictable(attention_mask)
    hidden = states_before(model.get_decoder(), input_ids, attention_mask, marked, packed)
    logits = model.get_output_embeddings()(hidden).float()
    return F.cross_entropy(logits, input_ids[marked], reduction="sum"), marked.sum()


class Supervised(Scorer):  # `nll` as a module, as `Scorer` is `score`
    def forward(self, *inputs: Tensor):
        return nll(self.model, *inputs, **self.options)
