"""The policy's loss: the clipped surrogate, the KL estimators, and how tokens are averaged.

All three algorithms (GRPO, PPO, REINFORCE) minimise the same thing and differ in the advantage:

    loss = sum_t w_t * (surrogate_t + beta * KL_t - c * entropy_t) / normalizer

over the tokens that the policy sampled (mask 1). Every tensor is `(B, T)`: B sequences, T tokens,
in nats. A position with mask 0 (prompt, documents, padding) can hold anything, infinities and NaN
too: inputs are replaced there before any arithmetic, because inf * 0 is NaN, in the value and again
in the gradient.

`normalizer` belongs to the whole batch of an optimiser step. Its parts add up over micro-batches
and processes, so that the split of a batch changes nothing: compute it first, give the same number
to every call, and add the losses. (DDP and FSDP then average gradients over processes, so a
training loop multiplies its loss by their number.)

Left out: dual clip, CISPO, corrections for a sampler that differs from the scored model (here
both are the same model).
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # a backstop that keeps exp() finite; far outside any clip range


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is 1, and 0, with gradient 0, where it is 0."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the mask's tokens, a scalar."""
    return keep(values, mask).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask's tokens, a scalar; 0 where there are none."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def token_weights(mask: Tensor, kind: str = "token",
                  max_tokens: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How much each token counts: weights `(B, T)`, and this batch's part of the normalizer.

    - "token" (DAPO, arXiv 2503.14476): every token of the batch counts the same.
      w = 1, normalizer = the number of tokens.
    - "sequence" (GRPO, arXiv 2402.03300): every sequence counts the same, so that a token of a
      long one counts less. w = 1 / |sequence|, normalizer = the number of sequences.
    - "constant" (Dr. GRPO, arXiv 2503.20783): like "token", but divided by the length a sequence
      may have instead of the length it has. w = 1 / max_tokens, normalizer = sequences again.

    The loss is sum(w * per_token) / normalizer, the normalizer summed over the whole batch. A row
    without any sampled token (a filler) counts nowhere.
    """
    weights = mask.float()
    lengths = weights.sum(dim=1, keepdim=True)  # (B, 1)
    sequences = (lengths > 0).sum()
    if kind == "token":
        return weights, lengths.sum()
    if kind == "sequence":
        return weights / lengths.clamp(min=1), sequences
    if kind == "constant":
        if not max_tokens:
            raise ValueError('"constant" token weights need max_tokens, the longest length allowed')
        return weights / max_tokens, sequences
    raise ValueError(f'token weights must be "token", "sequence" or "constant", got "{kind}"')


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.2,
                normalizer: float | Tensor | None = None, weights: Tensor | None = None,
                ratio_level: str = "token") -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped surrogate of PPO (arXiv 1707.06347), negated so that it is minimised:

        rho_t = exp(logprobs_t - old_logprobs_t)
        l_t   = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)
        loss  = sum_t w_t l_t / normalizer

    Without a normalizer it is the mean over the mask's tokens. `clip_high` > `clip_low` is DAPO's
    clip-higher. `ratio_level="sequence"` is GSPO (arXiv 2507.18071): one ratio per sequence, the
    geometric mean of its tokens' ratios, to be used with "sequence" weights and a clip of about
    3e-4. Old log-probabilities and advantages are constants: no gradient flows into them.

    With one update per batch of rollouts rho is exactly 1: the loss is then minus the mean
    advantage, which says nothing, but its gradient is the policy gradient, A_t grad logprobs_t.
    Clipping begins to matter with the second update on the same batch.

    The statistics are means over the mask's tokens (the maximum, the token count): `clip_fraction`,
    `ratio_mean`, `ratio_max`, and KL(old || new) by its k1 and k3 estimators. `merge_stats` joins
    those of several micro-batches or processes.
    """
    log_ratio = keep(logprobs, mask) - keep(old_logprobs.detach(), mask)  # (B, T)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = keep(advantages.detach(), mask)
    if ratio_level == "sequence":
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio = mean.exp().expand_as(log_ratio)
    elif ratio_level == "token":
        ratio = log_ratio.exp()
    else:
        raise ValueError(f'ratio_level must be "token" or "sequence", got "{ratio_level}"')

    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    per_token = -torch.minimum(unclipped, clipped)
    if weights is not None:
        if normalizer is None:
            raise ValueError("weights need the normalizer that token_weights gives with them")
        per_token = per_token * weights
    loss = average(per_token, mask, normalizer)

    with torch.no_grad():
        stats = {
            "tokens": mask.sum().float(),
            "clip_fraction": masked_mean((clipped < unclipped).float(), mask),
            "ratio_mean": masked_mean(ratio, mask),
            "ratio_max": keep(ratio, mask).max(),
            "approx_kl_k1": masked_mean(-log_ratio, mask),
            "approx_kl_k3": masked_mean(log_ratio.exp() - 1 - log_ratio, mask),
        }
    return loss, stats


def average(per_token: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Masked sum over `normalizer`, or over the mask's own count when that is None."""
    if normalizer is None:
        return masked_mean(per_token, mask)
    return masked_sum(per_token, mask) / normalizer


def kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """KL(policy || reference) estimated on each sampled token, `(B, T)`, 0 where the mask is 0.

    With d = logprobs - ref_logprobs on a token that the policy sampled
    (Schulman, joschu.net/blog/kl-approx):

        k1 = d                  unbiased, of either sign
        k2 = d^2 / 2            biased, small variance
        k3 = exp(-d) - 1 + d    unbiased, never negative

    A good estimate of a value need not have the right gradient (arXiv 2506.09477). As a loss, k2
    has in expectation exactly the gradient of the token's KL, d * grad logprobs; k3 has that of the
    KL the other way round, close to it while d is small; k1 has none (the mean of grad logprobs is
    0). In the reward, where no gradient flows, k1 is the right one. Choose one place, not both.

    The caller ADDS beta * kl to a loss it minimises. (The paper's code subtracts it, which rewards
    moving away from the reference; with beta = 0.001 this stays hidden for long.)

    Left out: what a token's choice does to the KL of later tokens; only k1 in the reward sees it.
    """
    if mask is not None:
        logprobs, ref_logprobs = keep(logprobs, mask), keep(ref_logprobs, mask)
    d = logprobs - ref_logprobs.detach()
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.exp(-d) - 1 + d
    raise ValueError(f'KL estimator must be "k1", "k2" or "k3", got "{kind}"')


def merge_stats(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch's statistics from those of its parts: means weighted by tokens, maxima, the sum.

    Merging merged parts is the same as merging all at once, so a process merges its micro-batches,
    and the processes' results are gathered and merged again.
    """
    tokens = torch.stack([part["tokens"] for part in parts])  # (parts,)
    merged = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        if name == "tokens":
            merged[name] = tokens.sum()
        elif name.endswith("_max"):
            merged[name] = values.max()
        else:
            merged[name] = (values * tokens).sum() / tokens.sum().clamp(min=1)
    return merged
