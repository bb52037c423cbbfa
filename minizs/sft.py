"""Supervised fine-tuning: the loss of a language model on the marked part of its texts.

Two parts of the method learn in this way: the simulator (which learns to write documents) and a
warm start of the policy (which learns to search from demonstrations). A text is a list of segments,
which are tokenised one by one, as a rollout appends them.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minizs.logprobs import Scorer, most_positions, predictable, states_before
from minizs.models.batches import attention, by_budget, pad
from minizs.models.support import final_logits
from minizs.protocol import prompt_ids, reply_ids

Segment = tuple[str, bool]  # a piece of text, and whether the loss is on it
Tokens = tuple[list[int], list[int]]  # ids and loss mask, of equal lengths


def encode(tokenizer, segments: list[Segment], end: bool = False) -> Tokens:
    """The ids of a whole text, and a mask that is 1 on the marked segments and 0 elsewhere.

    With `end` the end-of-sequence token is added and marked: the model learns to stop there.
    """
    texts = [text for text, _ in segments]
    marks = [marked for _, marked in segments]
    # Only what opens the text gets an opening token or a chat template, as a prompt does in use.
    pieces = [*prompt_ids(tokenizer, texts[:1]), *reply_ids(tokenizer, texts)[1:]]
    if end:
        pieces.append([tokenizer.eos_token_id])
        marks.append(True)
    ids: list[int] = []
    mask: list[int] = []
    for piece, marked in zip(pieces, marks, strict=True):
        ids += piece
        mask += [int(marked)] * len(piece)
    return ids, mask


def batches(
    texts: Iterable[Tokens], tokens: int, rng: Random, pool: int = 1024
) -> Iterator[list[Tokens]]:
    """Batches of at most `tokens` positions, padding counted, in random order. Texts of similar
    length come together; `pool` texts at a time are sorted into batches."""
    texts = iter(texts)
    while buffer := list(islice(texts, pool)):
        groups = by_budget([len(ids) for ids, _ in buffer], tokens)
        rng.shuffle(groups)
        for group in groups:
            yield [buffer[place] for place in group]


def endless_batches(texts: list[Tokens], tokens: int, seed: int) -> Iterator[list[Tokens]]:
    """Batches of one epoch after the other, each in a new order: a function of the seed alone, so
    that a resumed run passes over the batches that it has seen."""
    rng = Random(f"order {seed}")
    while True:
        shuffled = rng.sample(texts, len(texts))
        yield from batches(shuffled, tokens, rng)


def collate(rows: list[Tokens], device: torch.device | str = "cpu") -> list[Tensor]:
    """input_ids, attention_mask and loss_mask, each (B, T), padded on the right."""
    ids = [row_ids for row_ids, _ in rows]
    masks = [row_mask for _, row_mask in rows]
    tensors = [pad(ids), attention([len(row) for row in ids]), pad(masks)]
    return [tensor.to(device) for tensor in tensors]


def nll(
    model, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of the marked tokens, and their number; inputs are (B, T).

    A text's first token does not count, since nothing precedes it. `packed`: see `states_before`.
    """
    marked = loss_mask.bool() & predictable(attention_mask)  # (B, T)
    hidden = states_before(model.get_decoder(), input_ids, attention_mask, marked, packed)  # (M, d)
    targets = input_ids[marked]  # (M,)

    def through_head(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = final_logits(model, hidden).float()  # (chunk, V)
        return F.cross_entropy(logits, targets, reduction="sum")

    # With a large vocabulary the logits would be most of the memory, so that the head runs on a
    # chunk of the tokens at a time, and again in the backward pass.
    size = most_positions(model, hidden.device)
    if len(hidden) <= size:
        return through_head(hidden, targets), marked.sum()
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    losses = [checkpoint(through_head, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(losses).sum(), marked.sum()


class Supervised(Scorer):
    """`nll` as a module, as `Scorer` is `score`: what Accelerate prepares, and sees each call
    of."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return nll(self.model, *inputs, **self.options)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of a step (from 1): it rises over the share `warmup` of all steps, under a line that
    falls from the peak at the first step towards 0 after the last."""
    rise = step / max(1, round(warmup * steps))
    fall = (steps - step + 1) / steps
    return peak * min(1.0, rise, fall)


def train_step(accelerator, model, optimizer, rows: list[Tokens], max_grad_norm: float) -> float:
    """One optimiser step on the mean loss of a batch, which is shared out over the processes.

    `model` is a prepared `Supervised`, and all processes pass the same rows. Returns the mean loss
    of a marked token, before the step, over all processes.
    """
    inputs = _share(accelerator, rows)
    loss, count = model(*inputs)
    total = accelerator.reduce(count, "sum").clamp(min=1)
    # The gradients of processes are averaged, but the loss is a mean over all tokens of them.
    accelerator.backward(loss / total * accelerator.num_processes)
    accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return (accelerator.reduce(loss.detach(), "sum") / total).item()


@torch.no_grad()
def mean_loss(accelerator, model, texts: list[Tokens], tokens: int) -> float:
    """The mean loss of a marked token over these texts, without learning from them; `tokens` is the
    most positions of a forward pass, over all processes."""
    losses = 0.0
    counts = 0
    for group in by_budget([len(ids) for ids, _ in texts], tokens):
        loss, count = model(*_share(accelerator, [texts[place] for place in group]))
        losses += accelerator.reduce(loss, "sum").item()
        counts += accelerator.reduce(count, "sum").item()
    return losses / max(1, counts)


def _share(accelerator, rows: list[Tokens]) -> list[Tensor]:
    """This process's rows of a batch, collated. Where no row is left for it, it gets one with an
    empty mask: it has to take part in the forward pass, or the others would wait for ever."""
    share = rows[accelerator.process_index :: accelerator.num_processes]
    if share:
        return collate(share, accelerator.device)
    input_ids, attention_mask, loss_mask = collate(rows[:1], accelerator.device)
    return [input_ids, attention_mask, torch.zeros_like(loss_mask)]
