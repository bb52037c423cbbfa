"""Contrast: a reply without what another prompt would make likely.

One word of a simulator's prompt says whether documents shall be useful or noisy, and a small model
minds it too little: as noise it states the very fact that was asked for. So a token of a noisy
reply is made rarer where the word "useful" would make it likelier,

    log p = log p_own - w * max(0, log p_other - log p_own), up to a constant,

where p_other is what the same model says after the same prompt with the other word. This is
classifier-free guidance (arXiv 2306.17806), but in one direction: what "useful" makes rarer is not
made likelier, or else the noise would be far from what was asked for, and easy to see through.
Tokens that p_own finds hardly possible are left out, as in contrastive decoding (arXiv 2210.15097):
of them the ratio says nothing. None of this is in the ZeroSearch paper. Every token of such a reply
takes two forward passes, and CUDA graphs are not used.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minizs.generate import Decoder, Generated, Ints, decoding, live_rows
from minizs.logprobs import log_distribution
from minizs.models.support import final_logits
from minizs.sampling import draw, uniforms

POSSIBLE = 0.002  # a token's least probability, as a share of the likeliest one's


def contrast_distribution(own: Tensor, other: Tensor, weight: float, temperature: float) -> Tensor:
    """The log-probabilities (n, V) that are sampled from, of those after both prompts, (n, V) each.
    Temperature 0 gives those of temperature 1."""
    scores = own - weight * (other - own).clamp(min=0)
    least = own.amax(-1, keepdim=True) + math.log(POSSIBLE)  # (n, 1)
    scores = scores.masked_fill(own < least, -math.inf)
    return torch.log_softmax(scores / (temperature or 1.0), dim=-1)


def generate_with_contrast(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    others: Sequence[Sequence[int] | None],
    weight: float,
    temperature: float = 1.0,
    seed: int = 0,
    keys: Sequence[Ints] | None = None,
    vocab_size: int | None = None,
    eos_id: Ints | None = None,
) -> list[Generated]:
    """One turn for each prompt, in contrast to the prompt at the same place of `others`; where that
    is None, a turn as `generate` writes it.

    A row of the decoder that stands in contrast has a twin, which reads the other prompt; the token
    that is sampled joins both. All else is as in `generate`."""
    count = len(prompts)
    keys = list(keys if keys is not None else range(count))
    contrasted = [row for row in range(count) if others[row] is not None]
    twins = {row: count + place for place, row in enumerate(contrasted)}
    decoder = Decoder(
        model,
        [*prompts, *(others[row] for row in contrasted)],
        vocab_size=vocab_size,
        seed=seed,
        eos_id=eos_id,
        cuda_graphs="off",
    )
    drafts = decoder.drafts(
        range(count + len(twins)), max_new_tokens, keys + [keys[row] for row in contrasted]
    )
    position = 0
    live = list(range(count))
    with decoding(model):
        while live:
            rows, hidden = decoder.feed(live + [twins[row] for row in live if row in twins])
            logp = log_distribution(final_logits(model, hidden), 1.0, vocab_size)
            logp = contrast_rows(logp, rows, live, twins, weight, temperature)  # (n, V)
            uniform = uniforms([drafts[row].state for row in live], position)
            ids = logp.argmax(-1) if temperature == 0 else draw(logp, uniform)
            logprobs = logp.gather(-1, ids[:, None]).squeeze(-1)
            for row, token, logprob in zip(live, ids.tolist(), logprobs.tolist(), strict=True):
                decoder.accept(row, drafts[row], token, logprob)
                if row in twins:
                    decoder.accept(twins[row], drafts[twins[row]], token, logprob)
            position += 1
            live = [row for row in live_rows(drafts, position) if row < count]
    return [drafts[row].result for row in range(count)]


def contrast_rows(
    logp: Tensor,
    rows: list[int],
    live: list[int],
    twins: dict[int, int],
    weight: float,
    temperature: float,
) -> Tensor:
    """What is sampled from after each of the `live` rows, (n, V), of the log-probabilities (m, V)
    after `rows`, which are the live ones and their twins in another order."""
    place = {row: index for index, row in enumerate(rows)}
    result = torch.log_softmax(logp[[place[row] for row in live]] / (temperature or 1.0), dim=-1)
    paired = [index for index, row in enumerate(live) if row in twins]
    if paired:
        own = logp[[place[live[index]] for index in paired]]
        other = logp[[place[twins[live[index]]] for index in paired]]
        result[paired] = contrast_distribution(own, other, weight, temperature)
    return result
