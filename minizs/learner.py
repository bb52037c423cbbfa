"""One update of the policy from a batch of trajectories: score, advantages, loss, step.

The algorithms share all of it but two things:

                 advantage                       KL to the reference
    grpo         reward against its group        in the loss (k2 or k3)
    reinforce    reward minus a baseline         in the loss (k2 or k3)
    ppo          GAE with a critic               in the reward (k1)

`Learner` is the update of GRPO and of REINFORCE, and can be read alone. `PPOLearner`, below it,
adds the critic and changes where advantages and the KL come from.

Micro-batches and processes only split the work. One count of tokens, over all of them, normalises
the loss. Every process does the same number of forward passes, each through the module that
Accelerate prepared, so that gradients are reduced. A step whose loss or gradient is not finite is
skipped, by all processes alike: taken, it would make all weights NaN for good.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from minizs import grpo, losses, ppo, reinforce
from minizs.logprobs import Scorer
from minizs.models import flash
from minizs.models.batches import Batch, by_budget, make_batch
from minizs.models.fusion import compile_modules
from minizs.models.lora import lora_off
from minizs.models.weights import (
    checkpoint_layers,
    frozen_copy,
    frozen_weights,
    learned_weights,
)
from minizs.trajectory import Trajectory

# The loss of one micro-batch, from its tokens' weights and the normalizer of the whole minibatch.
LossFunction = Callable[[Batch, Tensor, Tensor], losses.Loss]


@dataclass
class Learner:
    """The update of GRPO and of REINFORCE.

    Modules and optimisers are those that Accelerate prepared. `settings` has the fields of
    `runs.settings.PolicyConfig` about the algorithm, the optimiser and the limits of a trajectory.
    """

    kl_in_loss: ClassVar[bool] = True

    accelerator: Accelerator
    settings: Any
    scorer: nn.Module  # log-probabilities and entropies under the policy
    optimizer: torch.optim.Optimizer
    reference: Callable | None = None  # the same under the frozen starting model; None without KL
    # Of the last update: rows whose loss or gradient was not finite, and for each row the
    # advantages of its tokens, (T,) or longer by padding.
    suspects: set[int] = field(default_factory=set)
    token_advantages: dict[int, Tensor] = field(default_factory=dict)

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """Learn from this process's trajectories, the rows of a group adjacent. Returns metrics."""
        # A minibatch is what one optimiser step learns from. Its batches are forward passes.
        minibatches = self._split(trajectories)
        batches = [batch for minibatch in minibatches for batch in minibatch]
        rewards = torch.tensor([t.reward for t in trajectories], device=self.accelerator.device)

        self._score(batches)
        metrics = self._set_advantages(batches, rewards)
        self._remember_advantages(batches)
        self.suspects = set()
        metrics |= self._learn(minibatches)
        return metrics

    @torch.no_grad()
    def _score(self, batches: list[Batch]) -> None:
        """Note what the policy, before it changes, and the reference say of each token, (B, T)."""
        # With a single optimiser step the ratio is 1 by construction: it needs no old values.
        if self.settings.minibatches > 1:
            for batch in batches:
                batch.old_logprobs, _ = self.scorer(batch.ids, batch.attention, batch.mask)
        if self.reference is not None:
            for batch in batches:
                batch.ref_logprobs, _ = self.reference(batch.ids, batch.attention, batch.mask)

    def _set_advantages(self, batches: list[Batch], rewards: Tensor) -> dict[str, float]:
        """All tokens of a trajectory share the advantage of its reward; rewards are (N,)."""
        advantages = self._outcome_advantages(rewards)  # (N,)
        for batch in batches:
            batch.advantages = advantages[batch.rows][:, None] * batch.mask  # (B, T)
        flat = grpo.flat_groups(rewards, self.settings.group_size).float()  # (N / G,)
        flat = self.accelerator.reduce(flat, "mean")
        return {"kl": 0.0, "flat_groups": flat.mean().item()}

    def _outcome_advantages(self, rewards: Tensor) -> Tensor:
        """The advantages of this process's rewards: (N,) to (N,)."""
        s = self.settings
        if s.algorithm == "reinforce":
            return reinforce.advantages(rewards, s.group_size, s.baseline)
        # The standard deviation of a batch is that of all processes together.
        everyone = self.accelerator.gather(rewards)
        advantages = grpo.group_advantages(everyone, s.group_size, s.advantage_scale)
        return advantages.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _remember_advantages(self, batches: list[Batch]) -> None:
        """Keep each row's advantages, which the page of the run shows. They stay on the device."""
        self.token_advantages = {}
        for batch in batches:
            for row, advantages in zip(batch.rows, batch.advantages, strict=True):
                # A filler, which repeats a row with advantages of 0, comes after the row itself.
                self.token_advantages.setdefault(row, advantages)

    def _learn(self, minibatches: list[list[Batch]]) -> dict[str, float]:
        """Train the policy. Returns metrics, with `skipped` 1 where a step was not finite."""
        metrics = self._optimize(
            self.scorer, self.optimizer, minibatches, self._policy_loss, self.settings.loss_average
        )
        metrics["skipped"] = int(math.isnan(metrics["grad_norm"]))
        return metrics

    def _policy_loss(self, batch: Batch, weights: Tensor, normalizer: Tensor) -> losses.Loss:
        """The surrogate, plus beta times the KL, minus the entropy bonus."""
        s = self.settings
        logprobs, entropy = self.scorer(batch.ids, batch.attention, batch.mask)  # (B, T) each
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        loss, stats = losses.policy_loss(
            logprobs,
            old_logprobs,
            batch.advantages,
            batch.mask,
            s.clip_low,
            s.clip_high,
            normalizer,
            weights,
        )
        if self.kl_in_loss and batch.ref_logprobs is not None:
            kl = losses.kl(logprobs, batch.ref_logprobs, s.kl_kind, batch.mask)  # (B, T)
            loss = loss + s.kl_coef * losses.average(kl * weights, batch.mask, normalizer)
            stats["kl"] = losses.average(kl.detach(), batch.mask)
        if s.entropy_coef:
            bonus = losses.average(entropy * weights, batch.mask, normalizer)
            loss = loss - s.entropy_coef * bonus
        stats["entropy"] = losses.average(entropy.detach(), batch.mask)
        # Sampler and scorer are the same model. They differ by rounding only, and this stays small.
        gap = losses.keep(old_logprobs - batch.sampled_logprobs, batch.mask).abs()
        stats["logprob_gap_max"] = gap.max().detach()
        return loss, stats

    # ---- the mechanics: micro-batches, processes, steps that are not finite ---------------------

    def _split(self, trajectories: list[Trajectory]) -> list[list[Batch]]:
        """Minibatches of micro-batches, as many micro-batches on every process.

        A process that has fewer of them adds fillers, whose mask is 0. Otherwise the others would
        wait for its forward passes for ever.
        """
        device = self.accelerator.device
        count = self.settings.minibatches
        minibatches = []
        for first in range(count):
            rows = range(first, len(trajectories), count)
            lengths = [len(trajectories[row].ids) for row in rows]
            batches = []
            for group in by_budget(lengths, self.settings.micro_tokens):
                batches.append(make_batch(trajectories, [rows[i] for i in group], device))
            counts = self.accelerator.gather(torch.tensor([len(batches)], device=device))
            for _ in range(int(counts.max()) - len(batches)):
                filler = make_batch(trajectories, [first], device)
                filler.mask.zero_()
                batches.append(filler)
            minibatches.append(batches)
        return minibatches

    def _optimize(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        minibatches: list[list[Batch]],
        loss_function: LossFunction,
        loss_average: str = "token",
    ) -> dict[str, float]:
        """Take a step for each minibatch. Returns statistics over all processes and `grad_norm`.

        The norm is that of before clipping, the mean over the steps; NaN where one was skipped.
        """
        stats: list[dict[str, Tensor]] = []
        norms: list[float] = []
        for minibatch in minibatches:
            weights, normalizer = self._weigh(minibatch, loss_average)
            step_stats, values = self._backward(
                module, minibatch, weights, normalizer, loss_function
            )
            norms.append(self._step(module, optimizer, minibatch, values))
            stats += step_stats
        metrics = self._merge(stats)
        metrics["grad_norm"] = sum(norms) / len(norms)
        return metrics

    def _weigh(self, minibatch: list[Batch], loss_average: str) -> tuple[list[Tensor], Tensor]:
        """The token weights (B, T) of each batch, and the normalizer over all processes."""
        longest = self.settings.max_turns * self.settings.max_turn_tokens
        weights = []
        counts = []
        for batch in minibatch:
            batch_weights, count = losses.token_weights(batch.mask, loss_average, longest)
            weights.append(batch_weights)
            counts.append(count)
        normalizer = self.accelerator.reduce(sum(counts).float(), "sum").clamp(min=1)
        return weights, normalizer

    def _backward(
        self,
        module: nn.Module,
        minibatch: list[Batch],
        weights: list[Tensor],
        normalizer: Tensor,
        loss_function: LossFunction,
    ) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Add up the gradients of all micro-batches. Returns statistics and losses of each.

        Nothing is read from the device in here, so that the next micro-batch can be queued while
        one is computed. (The scorer itself waits once, for the number of tokens to score.)
        """
        accelerator = self.accelerator
        stats = []
        values = []
        for batch, batch_weights in zip(minibatch, weights, strict=True):
            # Gradients are reduced over processes once, with the last micro-batch. Sharded ones
            # are reduced with each, or every process would have to hold them whole.
            waits = batch is not minibatch[-1] and not accelerator.is_fsdp2
            with accelerator.no_sync(module) if waits else nullcontext():
                loss, batch_stats = loss_function(batch, batch_weights, normalizer)
                # DDP takes the mean over processes, and the losses are parts of a sum.
                accelerator.backward(loss * accelerator.num_processes)
            stats.append(batch_stats)
            values.append(loss.detach().float())
        return stats, values

    def _step(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        minibatch: list[Batch],
        values: list[Tensor],
    ) -> float:
        """Clip and take the step, or skip it on all processes alike. Returns the norm, or NaN."""
        norm = self.accelerator.clip_grad_norm_(module.parameters(), self.settings.max_grad_norm)
        if hasattr(norm, "full_tensor"):  # of sharded gradients
            norm = norm.full_tensor()
        # Sums over the processes are not finite where one process's loss or norm is not. Both and
        # this process's norm are read from the device together.
        sums = self.accelerator.reduce(torch.stack([sum(values), norm.float()]), "sum")
        loss, norms, own_norm = torch.cat([sums, norm.float()[None]]).tolist()
        finite = math.isfinite(loss) and math.isfinite(norms)
        if finite:
            optimizer.step()
        else:
            self._suspect(minibatch, values, losses_are_finite=math.isfinite(loss))
        optimizer.zero_grad()
        return own_norm if finite else math.nan

    def _suspect(
        self, minibatch: list[Batch], values: list[Tensor], losses_are_finite: bool
    ) -> None:
        """Note the rows that may have spoilt a step.

        Those are the rows of the batches whose loss is not finite. Where all losses are finite and
        the gradient is not, any row may have spoilt it.
        """
        for batch, value in zip(minibatch, values, strict=True):
            if losses_are_finite or not value.isfinite():
                self.suspects.update(batch.rows)

    def _merge(self, stats: list[dict[str, Tensor]]) -> dict[str, float]:
        """The statistics of all micro-batches of all processes, as numbers."""
        merged = losses.merge_stats(stats)  # of this process
        names = list(merged)
        values = torch.stack([merged[name].float() for name in names])  # (S,)
        rows = self.accelerator.gather(values[None])  # (processes, S)
        merged = losses.merge_stats([dict(zip(names, row, strict=True)) for row in rows])
        numbers = torch.stack([merged[name] for name in names]).tolist()
        return dict(zip(names, numbers, strict=True))


@dataclass
class PPOLearner(Learner):
    """The update of PPO: advantages come from a critic, and the KL is part of the reward."""

    kl_in_loss: ClassVar[bool] = False

    critic: nn.Module | None = None
    critic_optimizer: torch.optim.Optimizer | None = None

    @torch.no_grad()
    def _score(self, batches: list[Batch]) -> None:
        """The critic's values, too, are those of before the update."""
        super()._score(batches)
        for batch in batches:
            batch.values = self.critic(batch.ids, batch.attention)

    def _set_advantages(self, batches: list[Batch], rewards: Tensor) -> dict[str, float]:
        """Advantages, whitened over the whole batch, and returns; rewards are (N,)."""
        s = self.settings
        kl_sum = 0.0
        totals = 0.0  # the moments of all advantages, (3,)
        for batch in batches:
            kl = torch.zeros_like(batch.sampled_logprobs)  # (B, T)
            if batch.ref_logprobs is not None:
                kl = losses.kl(batch.sampled_logprobs, batch.ref_logprobs, "k1", batch.mask)
            token_rewards = ppo.token_rewards(rewards[batch.rows], kl, batch.mask, s.kl_coef)
            batch.advantages, batch.returns = ppo.gae(
                token_rewards, batch.values, batch.mask, s.gamma, s.lam
            )
            totals = totals + ppo.moments(batch.advantages, batch.mask)
            kl_sum = kl_sum + kl.sum()
        totals = self.accelerator.reduce(totals, "sum")
        for batch in batches:
            batch.advantages = ppo.whiten(batch.advantages, batch.mask, totals)
        tokens = totals[2].clamp(min=1)
        return {"kl": (self.accelerator.reduce(kl_sum, "sum") / tokens).item()}

    def _learn(self, minibatches: list[list[Batch]]) -> dict[str, float]:
        """Train the policy, then the critic."""
        metrics = super()._learn(minibatches)
        critic = self._optimize(self.critic, self.critic_optimizer, minibatches, self._value_loss)
        norm = critic.pop("grad_norm")
        metrics |= critic
        metrics["critic_grad_norm"] = norm
        metrics["skipped"] = int(metrics["skipped"] or math.isnan(norm))
        return metrics

    def _value_loss(self, batch: Batch, weights: Tensor, normalizer: Tensor) -> losses.Loss:
        """The critic's loss is a mean over tokens, whatever the weights of the policy's loss."""
        return ppo.value_loss(
            self.critic(batch.ids, batch.attention),
            batch.values,
            batch.returns,
            batch.mask,
            self.settings.value_clip,
            normalizer,
        )


def build_learner(
    accelerator: Accelerator,
    settings: Any,
    model: nn.Module,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
) -> Learner:
    """The learner for a policy: scorer, reference, critic and optimisers, prepared by Accelerate.

    `dtype` is what the run computes in, and so the type of the reference's weights.
    """
    packed = flash.takes_packed(model)
    make_scorer = partial(
        Scorer, temperature=settings.temperature, vocab_size=vocab_size, packed=packed
    )
    if settings.gradient_checkpointing:
        checkpoint_layers(model)

    # Copies are made before the policy is prepared, which may shard it.
    copies = []
    reference = None
    if settings.kl_coef and not settings.lora_rank:
        frozen = frozen_copy(model, dtype)
        reference = make_scorer(frozen.to(accelerator.device))
        copies.append(frozen)
    critic = None
    if settings.algorithm == "ppo":  # the critic starts as the policy does (paper, appendix F)
        backbone = copy_backbone(accelerator, settings, model)
        critic = prepare(accelerator, ppo.Critic(backbone, packed), settings.critic_lr, settings)
        copies.append(backbone)

    if settings.compile_layers:
        for part in copies + [model]:
            compile_modules(part, whole_layers=True)

    scorer, optimizer = prepare(accelerator, make_scorer(model), settings.lr, settings)
    if settings.kl_coef and settings.lora_rank:
        reference = without_lora(scorer, model)
    if critic is None:
        return Learner(accelerator, settings, scorer, optimizer, reference)
    return PPOLearner(
        accelerator,
        settings,
        scorer,
        optimizer,
        reference,
        critic=critic[0],
        critic_optimizer=critic[1],
    )


def copy_backbone(accelerator: Accelerator, settings: Any, model: nn.Module) -> nn.Module:
    """A copy of the policy without its head, for the critic. It shares frozen embeddings, but not
    where each module is sharded, nor with a LoRA, whose base can be merged."""
    shares = not accelerator.is_fsdp2 and not settings.lora_rank
    return copy.deepcopy(model.base_model, frozen_weights(model) if shares else {})


def prepare(accelerator: Accelerator, module: nn.Module, lr: float, settings: Any):
    """The module and an AdamW for those of its weights that learn, both prepared by Accelerate."""
    weights = learned_weights(module)
    # On CUDA one kernel steps all weights; elsewhere PyTorch chooses.
    fused = True if accelerator.device.type == "cuda" else None
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=settings.weight_decay, fused=fused)
    return accelerator.prepare(module, optimizer)


def without_lora(scorer: nn.Module, model: nn.Module) -> Callable:
    """The scorer with the LoRA of its model switched off: a reference that needs no second copy."""

    def reference(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with lora_off(model):
            return scorer(*inputs)

    return reference
