"""The policy's loss: a clipped surrogate, an estimate of the KL, and how tokens are averaged.

GRPO, PPO and REINFORCE minimise the same function and differ in the advantage A_t:

    loss = sum_t w_t * (surrogate_t + beta * KL_t - c * entropy_t) / normalizer

The sum runs over the tokens that the policy sampled, those with mask 1. With the documents in the
sum the policy would learn to write documents. All tensors are (B, T): B sequences of T tokens.

Where the mask is 0 the inputs can hold anything, also infinities and NaN. They are replaced before
any arithmetic and not multiplied by the mask afterwards, because inf * 0 is NaN, in the gradient
as well. The normalizer belongs to the whole batch: it is the same for all micro-batches and all
processes, so that their losses add up.

Left out: GSPO, dual clip, CISPO, and corrections for a sampler that differs from the scored model
(here both are the same model).
"""

import torch
from torch import Tensor

Loss = tuple[Tensor, dict[str, Tensor]]  # what is minimised, and statistics for the log
MAX_LOG_RATIO = 20.0  # keeps exp() finite; it lies far outside any clip range


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is 1, and 0 with gradient 0 where the mask is 0."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def average(per_token: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """The sum over the mask's tokens, divided by the normalizer.

    Without a normalizer it is the mean over these tokens, or 0 if there are none.
    """
    if normalizer is None:
        normalizer = mask.sum().clamp(min=1)
    return keep(per_token, mask).sum() / normalizer


def token_weights(mask: Tensor, kind: str = "token", max_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """Weights w (B, T), and what these sequences add to the normalizer.

    - "token" (DAPO, arXiv 2503.14476): w = 1, and tokens are counted. A long sequence has more to
      say than a short one.
    - "sequence" (GRPO, arXiv 2402.03300): w = 1 / length, and sequences are counted. A token of a
      long sequence counts less.
    - "constant" (Dr. GRPO, arXiv 2503.20783): w = 1 / max_tokens, and sequences are counted. Here
      `max_tokens` is the most that a sequence may have.
    """
    weights = mask.float()
    lengths = weights.sum(dim=1, keepdim=True)  # (B, 1)
    sequences = (lengths > 0).sum()  # a filler has no tokens and does not count
    if kind == "token":
        return weights, lengths.sum()
    if kind == "sequence":
        return weights / lengths.clamp(min=1), sequences
    if kind == "constant" and max_tokens:
        return weights / max_tokens, sequences
    raise ValueError(
        f'token weights must be "token", "sequence" or, with max_tokens, "constant"; got "{kind}"'
    )


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
    """PPO's clipped surrogate (arXiv 1707.06347), negated so that it is minimised.

        rho_t = exp(logprobs_t - old_logprobs_t)
        l_t   = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)
        loss  = sum_t w_t l_t / normalizer

    All tensors are (B, T). A `clip_high` above `clip_low` is DAPO's clip-higher.

    With one update for each batch of rollouts rho is 1. The loss then is minus the mean advantage,
    which says nothing, but its gradient is the policy gradient, A_t * grad logprobs_t. Clipping
    begins to matter with the second update.
    """
    advantages = keep(advantages.detach(), mask)
    log_rho = keep(logprobs - old_logprobs.detach(), mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rho = log_rho.exp()
    unclipped = rho * advantages
    clipped = rho.clamp(1 - clip_low, 1 + clip_high) * advantages
    per_token = -torch.minimum(unclipped, clipped)
    if weights is not None:
        per_token = per_token * weights
    loss = average(per_token, mask, normalizer)
    stats = statistics(
        mask,
        clip_fraction=(clipped < unclipped).float(),
        ratio_mean=rho,
        approx_kl_k3=rho - 1 - log_rho,  # estimates KL(old || new)
    )
    stats["ratio_max"] = keep(rho.detach(), mask).max()
    return loss, stats


def kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """KL(policy || reference), estimated on each sampled token: (B, T), 0 where the mask is 0.

    With d = logprobs - ref_logprobs (Schulman, joschu.net/blog/kl-approx):

        k1 = d                  unbiased, of either sign
        k2 = d^2 / 2            biased, of small variance
        k3 = exp(-d) - 1 + d    unbiased, never negative

    An estimator with the right value need not have the right gradient (arXiv 2506.09477). In a
    loss, the mean gradient of k2 is that of the token's KL, d * grad logprobs. That of k3 is the
    gradient of the reverse KL, which is close while d is small. That of k1 is zero, as the mean of
    grad logprobs is. In a reward, where no gradient flows, k1 is right, and only there does a token
    answer for the KL of later ones. So choose one place: the loss (k2, k3) or the reward (k1).

    The caller ADDS beta * kl to a loss that it minimises. The paper's code subtracts it, which
    rewards moving away from the reference; with beta = 0.001 this stays hidden for long.
    """
    d = logprobs - ref_logprobs.detach()
    if mask is not None:
        d = keep(d, mask)
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
    """The number of tokens, and the mean of each of these (B, T) values over them."""
    stats = {"tokens": mask.sum().float()}
    for name, value in values.items():
        stats[name] = average(value, mask)
    return stats


def merge_stats(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The statistics of the whole from those of its parts.

    `tokens` is summed, a name that ends in `_max` has the largest value, and all others are means
    in which a part weighs as much as it has tokens.
    """
    tokens = torch.stack([part["tokens"] for part in parts])  # (parts,)
    total = tokens.sum()
    merged = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])  # (parts,)
        if name == "tokens":
            merged[name] = total
        elif name.endswith("_max"):
            merged[name] = values.max()
        else:
            merged[name] = (values * tokens).sum() / total.clamp(min=1)
    return merged
