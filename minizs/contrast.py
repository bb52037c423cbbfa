"""Contrast: a reply that its own prompt makes likely, and another prompt does not.

One word of a simulator's prompt says whether documents shall be useful or noisy, and a small model
minds it too little: as noise it states the very fact that was asked for. So each token is weighed
by how much likelier the word has made it,

    log p = log p_own + w * (log p_own - log p_other), up to a constant,

where p_other is what the same model says after the same prompt with the other word. This is
classifier-free guidance (arXiv 2306.17806). Tokens that p_own finds hardly possible are left out,
as in contrastive decoding (arXiv 2210.15097): of them the ratio says nothing. Neither is in the
ZeroSearch paper. Every token takes two forward passes, and CUDA graphs are not used.
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
    Those of temperature 0 are those of 1."""
    scores = own + weight * (own - other)
    least = own.amax(-1, keepdim=True) + math.log(POSSIBLE)  # (n, 1)
    scores = scores.masked_fill(own < least, -math.inf)
    return torch.log_softmax(scores / (temperature or 1.0), dim=-1)


def generate_with_contrast(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    others: Sequence[Sequence[int]],
    weight: float,
    temperature: float = 1.0,
    seed: int = 0,
    keys: Sequence[Ints] | None = None,
    vocab_size: int | None = None,
    eos_id: Ints | None = None,
) -> list[Generated]:
    """One turn for each prompt, in contrast to the prompt at the same place of `others`.

    Row i of the decoder reads prompt i, and its twin, row n + i, reads the other one; the token
    that is sampled joins both. All else is as in `generate`."""
    count = len(prompts)
    keys = list(keys if keys is not None else range(count))
    decoder = Decoder(
        model,
        [*prompts, *others],
        vocab_size=vocab_size,
        seed=seed,
        eos_id=eos_id,
        cuda_graphs="off",
    )
    drafts = decoder.drafts(range(2 * count), max_new_tokens, keys + keys)
    position = 0
    live = list(range(count))
    with decoding(model):
        while live:
            rows, hidden = decoder.feed(live + [count + row for row in live])
            logp = log_distribution(final_logits(model, hidden), 1.0, vocab_size)  # (2 n, V)
            place = {row: index for index, row in enumerate(rows)}
            own = logp[[place[row] for row in live]]
            other = logp[[place[count + row] for row in live]]
            logp = contrast_distribution(own, other, weight, temperature)  # (n, V)
            uniform = uniforms([drafts[row].state for row in live], position)
            ids = logp.argmax(-1) if temperature == 0 else draw(logp, uniform)
            logprobs = logp.gather(-1, ids[:, None]).squeeze(-1)
            for row, token, logprob in zip(live, ids.tolist(), logprobs.tolist(), strict=True):
                decoder.accept(row, drafts[row], token, logprob)
                decoder.accept(count + row, drafts[count + row], token, logprob)
            position += 1
            live = [row for row in live_rows(drafts, position) if row < count]
    return [drafts[row].result for row in range(count)]
