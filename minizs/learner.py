"""One optimiser update from a batch of trajectories: score, advantages, loss, step.

GRPO, PPO and REINFORCE share all of it but the advantage, and where the KL goes:

                 advantage                       KL to the reference
    grpo         reward against its group        in the loss (k2 or k3)
    reinforce    reward minus a baseline         in the loss (k2 or k3)
    ppo          GAE with a critic               in the reward (k1)

Micro-batches and processes only split the work: one count of tokens, over all of them, normalises
the loss, every process does the same number of forward passes, and the loss goes through the module
that Accelerate prepared, so that gradients are reduced. A step is skipped, by all processes alike,
when its loss or gradient is not finite: one such step, and all weights would be NaN for good.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from minizs import adapters, grpo, losses, ppo, reinforce
from minizs.batching import Batch, by_budget, collate
from minizs.logprobs import Scorer
from minizs.models import cast_weights, checkpoint_layers
from minizs.trajectory import Trajectory


@dataclass
class Learner:
    """What an update needs; modules and optimisers are those that Accelerate prepared."""

    accelerator: Accelerator
    settings: Any  # train_policy's
    scorer: nn.Module
    optimizer: Any
    reference: Callable | None = None  # a frozen scorer; None where no KL is asked for
    critic: nn.Module | None = None  # for PPO
    critic_optimizer: Any = None
    # Of the last update: rows whose loss was not finite, and each row's token advantages, (T,).
    suspects: set[int] = field(default_factory=set)
    advantages: dict[int, Tensor] = field(default_factory=dict)

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """Learn from this process's trajectories, the rows of a group adjacent. Returns metrics."""
        s = self.settings
        self.suspects, self.advantages = set(), {}
        minibatches = self._split(trajectories)
        parts = [part for minibatch in minibatches for part in minibatch]
        rewards = torch.tensor([t.reward for t in trajectories], device=self.accelerator.device)
        # With one update a batch the ratio is 1 by construction and needs no old log-probabilities.
        if s.minibatches > 1:
            self._score(self.scorer, parts, "old_logprobs")
        if self.reference is not None:
            self._score(self.reference, parts, "ref_logprobs")
        metrics = {"kl": 0.0}  # where there is no reference
        if s.algorithm == "ppo":
            self._score(self.critic, parts, "values")
            metrics["kl"] = self._ppo_advantages(parts, rewards)
        else:
            advantages = self._outcome_advantages(rewards)  # (N,)
            for part in parts:
                part.advantages = advantages[part.rows][:, None] * part.mask
            flat = grpo.flat_groups(rewards, s.group_size).float().mean()
            metrics["flat_groups"] = self.accelerator.reduce(flat, "mean").item()

        for part in parts:
            for row, values in zip(part.rows, part.advantages.cpu(), strict=True):
                self.advantages.setdefault(row, values)  # the first: a filler has zeros

        policy, critic = [], []  # (statistics, gradient norm) of each optimiser step
        for parts in minibatches:
            policy.append(self._step(self.scorer, self.optimizer, parts, self._policy_loss,
                                     s.loss_average))  # fmt: skip
            if s.algorithm == "ppo":
                critic.append(self._step(self.critic, self.critic_optimizer, parts,
                                         self._value_loss, "token"))  # fmt: skip
        for steps in filter(None, (policy, critic)):
            metrics |= self._gather([part for stats, _ in steps for part in stats])
        metrics["grad_norm"] = sum(norm for _, norm in policy) / len(policy)
        return metrics | {"skipped": int(any(math.isnan(norm) for _, norm in policy + critic))}

    def tokens(self, row: int, trajectory: Trajectory, tokenizer) -> dict[str, list]:
        """For the page of a run: each token's text and what the last update made of it."""
        ids = trajectory.ids
        alone = tokenizer.batch_decode([[token] for token in ids])
        both = tokenizer.batch_decode([list(pair) for pair in pairwise(ids)])
        # What a token adds to the one before it: some tokenizers put spaces only between words.
        pieces = alone[:1] + [b[len(a) :] for a, b in zip(alone, both, strict=False)]
        advantages = self.advantages[row][: len(pieces)].tolist()
        return {"pieces": pieces, "advantages": [round(a, 4) for a in advantages]}

    def _outcome_advantages(self, rewards: Tensor) -> Tensor:
        """GRPO's or REINFORCE's advantages of this process's rewards, (N,)."""
        s = self.settings
        if s.algorithm == "reinforce":
            return reinforce.advantages(rewards, s.group_size, s.baseline)
        # The batch's standard deviation is that of all processes together.
        everyone = self.accelerator.gather(rewards)
        advantages = grpo.group_advantages(everyone, s.group_size, s.advantage_scale)
        return advantages.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _ppo_advantages(self, parts: list[Batch], rewards: Tensor) -> float:
        """Sets advantages (whitened over the whole batch) and returns; gives the mean k1 KL."""
        s = self.settings
        totals = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        kl_sum = torch.zeros((), device=self.accelerator.device)
        for part in parts:
            kl = torch.zeros_like(part.sampled_logprobs)
            if part.ref_logprobs is not None:
                old = part.sampled_logprobs if part.old_logprobs is None else part.old_logprobs
                kl = losses.kl(old, part.ref_logprobs, "k1", part.mask)
            token_rewards = ppo.token_rewards(rewards[part.rows], kl, part.mask, s.kl_coef)
            part.advantages, part.returns = ppo.gae(token_rewards, part.values, part.mask,
                                                    s.gamma, s.lam)  # fmt: skip
            totals += ppo.moments(part.advantages, part.mask)
            kl_sum += kl.sum()
        totals = self.accelerator.reduce(totals, "sum")
        for part in parts:
            part.advantages = ppo.whiten(part.advantages, part.mask, totals)
        return (self.accelerator.reduce(kl_sum, "sum") / totals[2].clamp(min=1)).item()

    def _policy_loss(self, part: Batch, normalizer: Tensor) -> losses.Loss:
        s = self.settings
        weights, _ = self._weights(part, s.loss_average)
        logprobs, entropy = self.scorer(part.ids, part.attention, part.mask)
        old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        loss, stats = losses.policy_loss(
            logprobs, old, part.advantages, part.mask, s.clip_low, s.clip_high, normalizer, weights,
            s.ratio_level)  # fmt: skip
        if part.ref_logprobs is not None and s.algorithm != "ppo":
            kl = losses.kl(logprobs, part.ref_logprobs, s.kl_kind, part.mask)
            loss = loss + s.kl_coef * losses.average(kl * weights, part.mask, normalizer)
            stats["kl"] = losses.average(kl.detach(), part.mask)
        if s.entropy_coef:
            bonus = losses.average(entropy * weights, part.mask, normalizer)
            loss = loss - s.entropy_coef * bonus
        stats["entropy"] = losses.average(entropy.detach(), part.mask)
        # Sampler and scorer are the same model: what they disagree on is rounding, and stays small.
        gap = losses.keep(old - part.sampled_logprobs, part.mask).abs()
        stats["logprob_gap_max"] = gap.max().detach()
        return loss, stats

    def _value_loss(self, part: Batch, normalizer: Tensor) -> losses.Loss:
        values = self.critic(part.ids, part.attention)
        return ppo.value_loss(values, part.values, part.returns, part.mask,
                              self.settings.value_clip, normalizer)  # fmt: skip

    def _step(self, module: nn.Module, optimizer, parts: list[Batch], loss_of: Callable,
              average: str) -> tuple[list[dict[str, Tensor]], float]:  # fmt: skip
        """One optimiser step on the sum of the parts' losses: (statistics, gradient norm). If that
        sum or its gradient is not finite there is none, on any process, and the norm is NaN."""
        normalizer = self._normalizer(parts, average)
        all_stats, values = [], []
        for i, part in enumerate(parts):
            # Gradients are reduced over processes once, with the last micro-batch.
            last = i == len(parts) - 1
            # (Shards: with each, or every process would hold them whole.)
            alone = not last and not self.accelerator.is_fsdp2
            with self.accelerator.no_sync(module) if alone else nullcontext():
                loss, stats = loss_of(part, normalizer)
                self.accelerator.backward(loss * self.accelerator.num_processes)
            all_stats.append(stats)
            values.append(loss.detach().float())
        norm = float(self.accelerator.clip_grad_norm_(module.parameters(),
                                                      self.settings.max_grad_norm))  # fmt: skip
        guard = torch.stack([sum(values), torch.full_like(values[0], norm)])
        finite = self.accelerator.reduce(guard, "sum").isfinite()  # the same on all processes
        if finite.all():
            optimizer.step()
        else:  # with finite losses, any of them may have made the gradient
            bad = [p for p, v in zip(parts, values, strict=True) if finite[0] or not v.isfinite()]
            self.suspects |= {row for part in bad for row in part.rows}
        optimizer.zero_grad()
        return all_stats, norm if finite.all() else math.nan

    @torch.no_grad()
    def _score(self, module: nn.Module, parts: list[Batch], name: str) -> None:
        """Sets `name` of each part to what the module says of it, (B, T)."""
        for part in parts:
            inputs = (part.ids, part.attention)
            out = module(*inputs) if name == "values" else module(*inputs, part.mask)[0]
            setattr(part, name, out)

    def _split(self, trajectories: list[Trajectory]) -> list[list[Batch]]:
        """Minibatches (one optimiser step each) of micro-batches (one forward pass each).

        Every process gets the same number of micro-batches, with empty ones added where it has
        fewer: one that did fewer passes than the others would leave them waiting for ever.
        """
        s, minibatches = self.settings, []
        for first in range(s.minibatches):
            rows = list(range(first, len(trajectories), s.minibatches))
            groups = by_budget([len(trajectories[i].ids) for i in rows], s.micro_tokens)
            parts = [collate(trajectories, [rows[i] for i in group]) for group in groups]
            count = torch.tensor(len(parts), device=self.accelerator.device)
            most = int(self.accelerator.gather(count.view(1)).max())
            for _ in range(most - len(parts)):
                empty = collate(trajectories, rows[:1])
                empty.mask.zero_()
                parts.append(empty)
            minibatches.append([part.to(self.accelerator.device) for part in parts])
        return minibatches

    def _weights(self, part: Batch, kind: str) -> tuple[Tensor, Tensor]:
        longest = self.settings.max_turns * self.settings.max_turn_tokens
        return losses.token_weights(part.mask, kind, longest)

    def _normalizer(self, parts: list[Batch], kind: str) -> Tensor:
        """What the losses of all these parts, of all processes, are divided by."""
        total = torch.stack([self._weights(part, kind)[1].float() for part in parts]).sum()
        return self.accelerator.reduce(total, "sum").clamp(min=1)

    def _gather(self, stats: list[dict[str, Tensor]]) -> dict[str, float]:
        """Statistics of all micro-batches of all processes as one dictionary of numbers."""
        merged = losses.merge_stats(stats)
        rows = self.accelerator.gather(torch.stack([v.float() for v in merged.values()])[None])
        everyone = [dict(zip(merged, row, strict=True)) for row in rows]
        return {name: value.item() for name, value in losses.merge_stats(everyone).items()}


def build_learner(accelerator, settings, model, vocab_size: int,
                  dtype: torch.dtype = torch.float32) -> Learner:  # fmt: skip
    """Scorer, reference, critic and optimisers for a policy, prepared by Accelerate.

    The reference never changes: it is kept whole, in the type that the run computes in (`dtype`),
    or is the policy with its LoRA switched off.
    """
    packed = model.config._attn_implementation == "flash_attention_2"
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    make_scorer = partial(Scorer, temperature=settings.temperature, vocab_size=vocab_size,
                          packed=packed)  # fmt: skip
    reference = None
    if settings.kl_coef and not settings.lora_rank:
        reference = make_scorer(cast_weights(copy.deepcopy(model), dtype)).requires_grad_(False)
        reference = reference.to(accelerator.device)

    def prepare(module: nn.Module, lr: float):
        learned = [weight for weight in module.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr, weight_decay=settings.weight_decay)
        return accelerator.prepare(module, optimizer)

    critic = critic_optimizer = None
    if settings.algorithm == "ppo":  # the critic starts as the policy does (paper appendix F)
        critic = ppo.Critic(copy.deepcopy(model.base_model), packed)
        critic, critic_optimizer = prepare(critic, settings.critic_lr)
    scorer, optimizer = prepare(make_scorer(model), settings.lr)
    if settings.kl_coef and settings.lora_rank:

        def reference(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            with adapters.switched_off(model):
                return scorer(*inputs)

    return Learner(accelerator, settings, scorer, optimizer, reference, critic, critic_optimizer)
