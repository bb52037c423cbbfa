"""PPO: rewards per token, generalised advantages, a critic, and the critic's loss.

GRPO compares a trajectory with other trajectories. PPO compares it, token by token, with what a
critic expected (arXiv 1707.06347). A document between sampled tokens is part of the step from one
state to the next: it has no reward, no value, no discount, and no part in any statistic.

All tensors are (B, T), B trajectories of T tokens, and the mask is 1 on the sampled tokens.

Left out: an adaptive KL coefficient, and bootstrapping of truncated trajectories. These are worth
what they scored, which is 0.
"""

import torch
from torch import Tensor, nn

from minizs.logprobs import predictable, states_before
from minizs.losses import Loss, average, keep, statistics
from minizs.models.precision import widest_float


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Rewards of tokens (B, T) from the rewards R of trajectories (B,) and the KL of tokens (B, T).

        r_t = R * [t is the last sampled token] - beta * k1_t

    The KL (`losses.kl`, kind k1) is subtracted because a reward is maximised. The paper's beta is
    0.001 (appendix F).
    """
    is_last = mask.bool() & (mask.cumsum(1) == mask.sum(1, keepdim=True))  # (B, T)
    outcome = torch.where(is_last, rewards.unsqueeze(1), 0.0)  # (B, T)
    return outcome - beta * keep(kl.detach(), mask)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) over the sampled tokens alone.

        delta_t = r_t + gamma * V_next - V_t
        A_t     = delta_t + gamma * lam * A_next        returns_t = A_t + V_t

    "Next" is the next sampled token; V_next and A_next are 0 after the last one. Documents are
    skipped: if credit had to walk through them, it would fade with their length (for lam < 1).
    `values[b, t]` is the value of the state before token t is sampled.

    Returns (advantages, returns), each (B, T). Advantages are not whitened and are 0 where the mask
    is. The paper uses gamma = lam = 1, where A_t = (sum of the rewards from t on) - V_t.
    """
    rewards = keep(rewards, mask)
    values = keep(values, mask)
    sampled = mask.bool()
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])  # (B,)
    next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(sampled[:, t], values[:, t], next_value)
        next_advantage = torch.where(sampled[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(sampled[:, t], advantage, 0.0)
    return advantages, advantages + values


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """The sum, the sum of squares and the count over the mask's tokens: (3,).

    The moments of a batch are the sum of the moments of its parts. They are float64 where the
    device has it.
    """
    values = keep(values, mask).to(widest_float(values.device))
    return torch.stack([values.sum(), values.square().sum(), mask.sum().to(values.dtype)])


def whiten(advantages: Tensor, mask: Tensor, totals: Tensor | None = None) -> Tensor:
    """(A - mean) / (std + 1e-8) over the mask's tokens, and 0 elsewhere.

    `totals` are the `moments` of the whole batch, summed over its parts and over all processes.
    Without them, these rows are the whole batch. The standard deviation is a sample's (n - 1).
    """
    if totals is None:
        totals = moments(advantages, mask)
    total, squares, count = totals
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
    """Half the squared error. It has no gradient once a value moved by `clip` towards its return.

        V_clip = V_old + clip(V - V_old, -clip, clip)
        loss   = sum_t 1/2 max((V_t - R_t)^2, (V_clip - R_t)^2) / normalizer

    Rewards are at most 1, so that the paper's clip of 0.5 is wide.
    """
    values = keep(values, mask)
    old_values = keep(old_values.detach(), mask)
    returns = keep(returns.detach(), mask)
    near_values = old_values + (values - old_values).clamp(-clip, clip)
    unclipped = (values - returns).square()
    clipped = (near_values - returns).square()
    loss = average(0.5 * torch.maximum(unclipped, clipped), mask, normalizer)
    stats = statistics(
        mask,
        value_clip_fraction=(clipped > unclipped).float(),
        value_error=unclipped,
        value_mean=values,
        return_mean=returns,
    )
    return loss, stats


class Critic(nn.Module):
    """The value of the state before each token: a scalar head on a backbone of its own.

    The backbone is a causal model's `base_model`. The head starts at 0, so that the first
    advantages are the rewards and not the noise of a random head.
    """

    def __init__(self, backbone: nn.Module, packed: bool = False):
        super().__init__()
        self.backbone = backbone
        self.packed = packed
        self.head = nn.Linear(backbone.config.hidden_size, 1)
        for weight in self.head.parameters():
            nn.init.zeros_(weight)
        # FSDP looks here for the layer classes to shard, and else shards none.
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) token ids to (B, T) values in float32, each from the tokens before it.

        The value is 0 on first tokens, which nothing precedes, and on padding.
        """
        real = predictable(attention_mask)  # (B, T)
        hidden = states_before(
            self.backbone, input_ids, attention_mask, real, self.packed
        )  # (M, d): M tokens have a state before them
        values = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()  # (M,)
        return torch.zeros(input_ids.shape, device=values.device).masked_scatter(real, values)
