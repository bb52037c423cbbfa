"""PPO: rewards per token, generalised advantages, a critic, and the critic's loss.

Where GRPO compares a trajectory with others, PPO compares it with what a critic expected, token by
token (arXiv 1707.06347). A document between sampled tokens (mask 1) is part of the step from one
state to the next: no reward, value, discount or statistic comes from it.
Left out: adaptive KL, bootstrapping of truncated trajectories (they are worth what they scored, 0).
"""

import torch
from torch import Tensor, nn

from minizs.logprobs import predictable, states_before
from minizs.losses import Loss, average, keep, statistics
from minizs.models.precision import widest_float


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t = R * [t is the last sampled token] - beta * k1_t, from rewards R `(B,)` of trajectories
    and k1 (`losses.kl`), minus as a reward is maximised. Paper appendix F: beta = 0.001."""
    is_last = mask.bool() & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return torch.where(is_last, rewards.unsqueeze(1), 0.0) - beta * keep(kl.detach(), mask)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) over the sampled tokens alone:

        delta_t = r_t + gamma * V_next - V_t
        A_t     = delta_t + gamma * lam * A_next        returns_t = A_t + V_t

    "Next" is the next sampled token, and both are 0 after the last one: through the documents,
    credit would fade with their length (lam < 1). `values[b, t]` is that of the state before token
    t. Returns `(advantages, returns)`, not whitened, 0 at masked positions. The paper uses gamma =
    lam = 1: A_t = (sum of rewards from t on) - V_t."""
    rewards, values, sampled = keep(rewards, mask), keep(values, mask), mask.bool()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(sampled[:, t], values[:, t], next_value)
        next_advantage = torch.where(sampled[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(sampled[:, t], advantage, 0.0)
    return advantages, advantages + values


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Sum, sum of squares, count over the mask's tokens: `(3,)`, float64 where the device has it.
    Those of parts add up."""
    values = keep(values, mask).to(widest_float(values.device))
    return torch.stack([values.sum(), values.square().sum(), mask.sum().to(values.dtype)])


def whiten(advantages: Tensor, mask: Tensor, totals: Tensor | None = None) -> Tensor:
    """(A - mean) / (std + 1e-8) over the mask's tokens, 0 elsewhere; std is a sample's (n - 1).
    `totals`: the `moments` of the whole batch, summed over parts and processes."""
    total, squares, count = moments(advantages, mask) if totals is None else totals
    mean = total / count.clamp(min=1)
    variance = (squares - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    wide = advantages.to(widest_float(advantages.device))
    whitened = (wide - mean) / (variance.sqrt() + 1e-8)
    return keep(whitened, mask).to(advantages.dtype)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    normalizer: float | Tensor | None = None,
) -> Loss:
    """Half the squared error, without gradient once a value has moved by `clip` towards its return:

        V_clip = V_old + clip(V - V_old, -clip, clip)
        loss   = sum_t 1/2 max((V - R)^2, (V_clip - R)^2) / normalizer

    Rewards are at most 1: a clip of 0.5 (the paper's code) is wide."""
    inputs = values, old_values.detach(), returns.detach()
    values, old_values, returns = (keep(tensor, mask) for tensor in inputs)
    moved = old_values + (values - old_values).clamp(-clip, clip)
    unclipped, clipped = (values - returns).square(), (moved - returns).square()
    loss = average(0.5 * torch.maximum(unclipped, clipped), mask, normalizer)
    return loss, statistics(
        mask,
        value_clip_fraction=(clipped > unclipped).float(),
        value_error=unclipped,
        value_mean=values,
        return_mean=returns,
    )


class Critic(nn.Module):
    """The value of the state before each token: a scalar head on a `backbone` of its own (a causal
    model's `base_model`). It starts at 0: the first advantages are the rewards."""

    def __init__(self, backbone: nn.Module, packed: bool = False):
        super().__init__()
        self.backbone, self.packed = backbone, packed
        self.head = nn.Linear(backbone.config.hidden_size, 1)
        for weight in self.head.parameters():
            nn.init.zeros_(weight)
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values `(B, T)`, float32, each from the tokens before; 0 on first tokens and padding."""
        real = predictable(attention_mask)  # (B, T)
        hidden = states_before(self.backbone, input_ids, attention_mask, real, self.packed)
        values = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()  # (M,)
        return torch.zeros(input_ids.shape, device=values.device).masked_scatter(real, values)
