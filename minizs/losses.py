"""The policy's loss: the clipped surrogate, the KL estimators, and how tokens are averaged.

GRPO, PPO and REINFORCE minimise the same thing and differ in the advantage:

    loss = sum_t w_t * (surrogate_t + beta * KL_t - c * entropy_t) / normalizer

over the tokens that the policy sampled, mask 1 (else it would learn to write the documents). All
tensors are `(B, T)`: B sequences, T tokens. Where the mask is 0 they can hold anything, NaN too: it
is replaced before any arithmetic, because inf * 0 is NaN, in gradients as well. `normalizer` is the
whole batch's: given to all micro-batches and processes, their losses add up.
Left out: GSPO, dual clip, CISPO, corrections for a sampler that is not the scored model (it is)."""

import torch
from torch import Tensor

Loss = tuple[Tensor, dict[str, Tensor]]  # what is minimised, and statistics to be logged
MAX_LOG_RATIO = 20.0  # a backstop that keeps exp() finite; far outside any clip range


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is 1, and 0, with gradient 0, where it is 0."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def average(per_token: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Masked sum over `normalizer`, or over the mask's own count (a mean) when that is None."""
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return keep(per_token, mask).sum() / count


def token_weights(mask: Tensor, kind: str = "token", max_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """Weights w `(B, T)`, and this batch's part of the normalizer: its tokens, or else sequences.

    - "token" (DAPO, arXiv 2503.14476): w = 1.
    - "sequence" (GRPO, arXiv 2402.03300): w = 1 / |sequence|: a token of a long one counts less.
    - "constant" (Dr. GRPO, arXiv 2503.20783): w = 1 / max_tokens, the most that one may have."""
    weights = mask.float()
    lengths = weights.sum(dim=1, keepdim=True)  # (B, 1)
    if kind == "token":
        return weights, lengths.sum()
    if kind == "sequence":
        return weights / lengths.clamp(min=1), (lengths > 0).sum()
    if kind == "constant" and max_tokens:
        return weights / max_tokens, (lengths > 0).sum()
    raise ValueError(f'token weights: "token", "sequence", "constant" (max_tokens); got "{kind}"')


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalizer: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> Loss:
    """The clipped surrogate of PPO (arXiv 1707.06347), negated so that it is minimised:

        rho_t = exp(logprobs_t - old_logprobs_t)
        l_t   = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)
        loss  = sum_t w_t l_t / normalizer

    `clip_high` > `clip_low` is DAPO's clip-higher. With one update per batch of rollouts rho is 1:
    the loss is minus the mean advantage, which says nothing, but its gradient is the policy
    gradient, A_t grad logprobs_t. Clipping begins to matter with a second update."""
    log_rho = keep(logprobs - old_logprobs.detach(), mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rho, advantages = log_rho.exp(), keep(advantages.detach(), mask)
    unclipped = rho * advantages
    clipped = rho.clamp(1 - clip_low, 1 + clip_high) * advantages
    per_token = -torch.minimum(unclipped, clipped)
    loss = average(per_token if weights is None else per_token * weights, mask, normalizer)
    stats = statistics(
        mask,
        clip_fraction=(clipped < unclipped).float(),
        ratio_mean=rho,
        approx_kl_k3=rho - 1 - log_rho,
    )  # KL(old || new)
    return loss, stats | {"ratio_max": keep(rho.detach(), mask).max()}


def kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """KL(policy || reference) estimated on each sampled token, `(B, T)`, 0 where the mask is 0.

    With d = logprobs - ref_logprobs (Schulman, joschu.net/blog/kl-approx):

        k1 = d                  unbiased, of either sign
        k2 = d^2 / 2            biased, small variance
        k3 = exp(-d) - 1 + d    unbiased, never negative

    A good value need not have the right gradient (arXiv 2506.09477). As a loss, the mean gradient
    of k2 is that of the token's KL, d * grad logprobs; of k3 that of the reverse KL, close while d
    is small; of k1 zero (as the mean of grad logprobs is), but k1 is right in the reward, where no
    gradient flows: only there does a token answer for the KL of later ones. Choose one place.

    The caller ADDS beta * kl to a loss it minimises. (The paper's code subtracts it, which rewards
    moving away from the reference; with beta = 0.001 this stays hidden for long.)
    """
    d = logprobs - ref_logprobs.detach()
    d = d if mask is None else keep(d, mask)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.exp(-d) - 1 + d
    raise ValueError(f'KL estimator must be "k1", "k2" or "k3", got "{kind}"')


@torch.no_grad()
def statistics(mask: Tensor, **values: Tensor) -> dict[str, Tensor]:
    """The number of tokens, and the mean of each of these values over them: for `merge_stats`."""
    return {"tokens": mask.sum().float()} | {k: average(v, mask) for k, v in values.items()}


def merge_stats(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole's statistics from its parts': means weighted by `tokens`, maxima of any `_max`."""
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}  # (parts,)
    tokens = stacked["tokens"]
    means = {name: (v * tokens).sum() / tokens.sum().clamp(min=1) for name, v in stacked.items()}
    maxima = {name: v.max() for name, v in stacked.items() if name.endswith("_max")}
    return means | maxima | {"tokens": tokens.sum()}
