"""PPO: rewards per token, generalised advantages, a critic, and the critic's loss.

Where GRPO compares a trajectory with others, PPO compares it with what a critic expected, token by
token (arXiv 1707.06347). The surrogate is `losses.policy_loss`.

A trajectory of a search agent has holes: documents that the environment wrote, between the tokens
that the policy sampled (mask 1). For the policy a document is part of the step from one state to
the next, not a step of its own. So everything here passes over masked positions: no reward, no
value, no discount and no statistic comes from them, whatever they hold.

Shapes are `(B, T)` unless said otherwise; position t is about sampling token t, as in `logprobs`.

Left out: bootstrapping of truncated trajectories (one that ran out of budget is worth what it
scored, 0), and an adaptive KL coefficient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minizs.losses import average, keep, masked_mean


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Rewards of trajectories `(B,)` and KL per token as rewards per token:

        r_t = R * [t is the last sampled token] - beta * k1_t

    with k1 = old_logprobs - ref_logprobs (`losses.kl`), the estimator that is right in a reward
    (paper appendix F: beta = 0.001). A row without any sampled token gets no reward at all.
    """
    sampled_from_here = mask.long().flip(1).cumsum(1).flip(1)  # how many are left, t included
    is_last = mask.bool() & (sampled_from_here == 1)
    return torch.where(is_last, rewards.unsqueeze(1), 0.0) - beta * keep(kl.detach(), mask)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalised advantage estimation (arXiv 1506.02438) over the sampled tokens alone:

        delta_t = r_t + gamma * V_next - V_t
        A_t     = delta_t + gamma * lam * A_next        returns_t = A_t + V_t

    where "next" is the next sampled token, however long the document before it, and both are 0
    after the last one. `values[b, t]` is the value of the state before token t. Returns
    `(advantages, returns)`, not whitened, 0 at masked positions.

    The paper uses gamma = lam = 1, where A_t = (sum of rewards from t on) - V_t and walking through
    documents does no harm; with lam < 1 it would make credit fade with their length.
    """
    rewards, values, sampled = keep(rewards, mask), keep(values, mask), mask.bool()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(sampled[:, t], values[:, t], next_value)
        next_advantage = torch.where(sampled[:, t], advantage, next_advantage)
        advantages[:, t] = advantage
    advantages = keep(advantages, mask)
    return advantages, advantages + values


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """`(sum, sum of squares, count)` over the mask's tokens, float64 `(3,)`.

    Moments of parts add up to the moments of the whole: sum them over processes before `whiten`.
    """
    values = keep(values, mask).double()
    return torch.stack([values.sum(), values.square().sum(), mask.sum().double()])


def whiten(advantages: Tensor, mask: Tensor, batch_moments: Tensor | None = None) -> Tensor:
    """(A - mean) / (std + 1e-8) over the mask's tokens, 0 elsewhere; std is a sample's (n - 1).

    It makes the step's size independent of the rewards' scale. `batch_moments` are those of the
    whole batch where `advantages` are only a part of it. Not for the returns, whose scale the
    critic has to learn.
    """
    total, squares, count = moments(advantages, mask) if batch_moments is None else batch_moments
    mean = total / count.clamp(min=1)
    variance = (squares - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    whitened = (keep(advantages, mask).double() - mean) / (variance.sqrt() + 1e-8)
    return keep(whitened, mask).to(advantages.dtype)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float,
               normalizer: float | Tensor | None = None,
               ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Half the squared error, where a value gains nothing by moving more than `clip` at a time:

        V_clip = V_old + clip(V - V_old, -clip, clip)
        loss   = sum_t 1/2 max((V - R)^2, (V_clip - R)^2) / normalizer

    over the mask's tokens, or their mean when `normalizer` is None. The maximum takes the gradient
    away from a value that has already moved by `clip` towards its return, never from one that moved
    away. Rewards are at most 1, so the paper's code's 0.5 is wide; infinity turns the clip off. The
    statistics are means over the mask's tokens, for `losses.merge_stats`.
    """
    values = keep(values, mask)
    old_values, returns = keep(old_values.detach(), mask), keep(returns.detach(), mask)
    moved = old_values + (values - old_values).clamp(-clip, clip)
    unclipped, clipped = (values - returns).square(), (moved - returns).square()
    loss = average(0.5 * torch.maximum(unclipped, clipped), mask, normalizer)

    with torch.no_grad():
        stats = {
            "tokens": mask.sum().float(),
            "value_clip_fraction": masked_mean((clipped > unclipped).float(), mask),
            "value_error": masked_mean(unclipped, mask),  # mean squared
            "value_mean": masked_mean(values, mask),
            "return_mean": masked_mean(returns, mask),
        }
    return loss, stats


class Critic(nn.Module):
    """A transformer's body with a scalar head: the value of the state before each token.

    `backbone` is a `transformers` model without a head (`AutoModel`, or a causal model's
    `base_model`), its own copy, not shared with the policy. The head starts at zero, so that the
    first advantages are the rewards themselves and not a random head's opinion.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # Sharding looks for the layer class on the outermost module, and finds nothing without it.
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values `(B, T)`, float32: out[:, t] comes from the tokens before t, and out[:, 0] = 0.

        Positions count real tokens only, so that padding on either side changes no value.
        """
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state  # (B, T, hidden)
        after = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()  # (B, T)
        return F.pad(after[:, :-1], (1, 0))  # the state after token t - 1 is the one before t
