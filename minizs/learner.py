"""One optimiser update from a batch of trajectories: score, advantages, loss, step.

GRPO, PPO and REINFORCE share all of it but the advantage, and where the KL goes:

                 advantage                       KL to the reference
    grpo         reward against its group        in the loss (k2 or k3)
    reinforce    reward minus a baseline         in the loss (k2 or k3)
    ppo          GAE with a critic               in the reward (k1)

Micro-batches and processes only split the work: one count of tokens, over all of them, normalises
the loss, every process does the same number of forward passes, and the loss goes through the module
that Accelerate prepared, so that gradients are reduced. A step is skipped, by all processes alike,
when its loss or gradient is not finite: one such step, and all weights would be NaN for good."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from minizs import grpo, losses, ppo, reinforce
from minizs.logprobs import Scorer
from minizs.models.batches import Batch, by_budget, collate
from minizs.models.lora import lora_off
from minizs.models.weights import cast_weights, checkpoint_layers
from minizs.trajectory import Trajectory


@dataclass
class Learner:
    """What an update needs; modules and optimisers are those that Accelerate prepared."""

    accelerator: Accelerator
    settings: Any  # a PolicyConfig
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
        batches = self._split(trajectories)
        parts = [part for batch in batches for part in batch]
        rewards = torch.tensor([t.reward for t in trajectories], device=self.accelerator.device)
        # With one update a batch the ratio is 1 by construction and needs no old log-probabilities.
        if s.minibatches > 1:
            self._score(self.scorer, parts, "old_logprobs")
        if self.reference is not None:
            self._score(self.reference, parts, "ref_logprobs")
        if s.algorithm == "ppo":
            self._score(self.critic, parts, "values")
            metrics = {"kl": self._ppo_advantages(parts, rewards)}
        else:
            advantages = self._outcome_advantages(rewards)  # (N,)
            for part in parts:
                part.advantages = advantages[part.rows][:, None] * part.mask
            flat = self.accelerator.reduce(grpo.flat_groups(rewards, s.group_size).float(), "mean")
            metrics = {"kl": 0.0, "flat_groups": flat.mean().item()}
        for part in parts:
            for row, values in zip(part.rows, part.advantages.cpu(), strict=True):
                self.advantages.setdefault(row, values)  # the first: a filler has zeros

        policy = self._learn(
            self.scorer, self.optimizer, batches, self._policy_loss, s.loss_average
        )
        critic = {}
        if s.algorithm == "ppo":
            critic = self._learn(self.critic, self.critic_optimizer, batches, self._value_loss)
            critic["critic_grad_norm"] = critic.pop("grad_norm")
        skipped = math.isnan(policy["grad_norm"] + critic.get("critic_grad_norm", 0.0))
        return metrics | critic | policy | {"skipped": int(skipped)}

    def tokens(self, row: int, trajectory: Trajectory, tokenizer) -> dict[str, list]:
        """For the page of a run: each token's text and its advantage in the last update."""
        ids = trajectory.ids
        # What a token adds to the one before it: some tokenizers put spaces only between words.
        before = ["", *tokenizer.batch_decode([[token] for token in ids[:-1]])]
        both = tokenizer.batch_decode([ids[max(0, i - 1) : i + 1] for i in range(len(ids))])
        pieces = [b[len(a) :] for a, b in zip(before, both, strict=True)]
        advantages = self.advantages[row][: len(ids)].tolist()
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
        s, totals, kl_sum = self.settings, 0.0, 0.0
        for part in parts:
            kl = torch.zeros_like(part.sampled_logprobs)
            if part.ref_logprobs is not None:
                kl = losses.kl(part.sampled_logprobs, part.ref_logprobs, "k1", part.mask)
            reward = ppo.token_rewards(rewards[part.rows], kl, part.mask, s.kl_coef)
            part.advantages, part.returns = ppo.gae(reward, part.values, part.mask, s.gamma, s.lam)
            totals = totals + ppo.moments(part.advantages, part.mask)
            kl_sum = kl_sum + kl.sum()
        totals = self.accelerator.reduce(totals, "sum")
        for part in parts:
            part.advantages = ppo.whiten(part.advantages, part.mask, totals)
        return (self.accelerator.reduce(kl_sum, "sum") / totals[2].clamp(min=1)).item()

    def _policy_loss(self, part: Batch, weights: Tensor, normalizer: Tensor) -> losses.Loss:
        s = self.settings
        logprobs, entropy = self.scorer(part.ids, part.attention, part.mask)
        old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        loss, stats = losses.policy_loss(
            logprobs, old, part.advantages, part.mask, s.clip_low, s.clip_high, normalizer, weights
        )
        if part.ref_logprobs is not None and s.algorithm != "ppo":
            kl = losses.kl(logprobs, part.ref_logprobs, s.kl_kind, part.mask)
            loss = loss + s.kl_coef * losses.average(kl * weights, part.mask, normalizer)
            stats["kl"] = losses.average(kl.detach(), part.mask)
        if s.entropy_coef:
            loss = loss - s.entropy_coef * losses.average(entropy * weights, part.mask, normalizer)
        stats["entropy"] = losses.average(entropy.detach(), part.mask)
        # Sampler and scorer are the same model: what they disagree on is rounding, and stays small.
        gap = losses.keep(old - part.sampled_logprobs, part.mask).abs()
        return loss, stats | {"logprob_gap_max": gap.max().detach()}

    def _value_loss(self, part: Batch, _: Tensor, normalizer: Tensor) -> losses.Loss:
        return ppo.value_loss(
            self.critic(part.ids, part.attention),
            part.values,
            part.returns,
            part.mask,
            self.settings.value_clip,
            normalizer,
        )

    def _learn(
        self,
        module: nn.Module,
        optimizer,
        minibatches: list[list[Batch]],
        loss_of: Callable,
        average: str = "token",
    ) -> dict[str, float]:
        """A step on each minibatch: everyone's statistics, the mean gradient norm (NaN: a skip)."""
        steps = [self._step(module, optimizer, parts, loss_of, average) for parts in minibatches]
        merged = losses.merge_stats([part for stats, _ in steps for part in stats])
        rows = self.accelerator.gather(torch.stack([v.float() for v in merged.values()])[None])
        everyone = losses.merge_stats([dict(zip(merged, row, strict=True)) for row in rows])
        norm = sum(norm for _, norm in steps) / len(steps)
        return {name: value.item() for name, value in everyone.items()} | {"grad_norm": norm}

    def _step(
        self, module: nn.Module, optimizer, parts: list[Batch], loss_of: Callable, average: str
    ) -> tuple[list[dict[str, Tensor]], float]:
        """One optimiser step on the sum of the parts' losses: (statistics, gradient norm). If that
        sum or its gradient is not finite there is none, on any process, and the norm is NaN."""
        s, accelerator, all_stats, values = self.settings, self.accelerator, [], []
        longest = s.max_turns * s.max_turn_tokens
        weights, counts = zip(
            *(losses.token_weights(part.mask, average, longest) for part in parts), strict=True
        )
        normalizer = accelerator.reduce(sum(counts).float(), "sum").clamp(min=1)
        for part, part_weights in zip(parts, weights, strict=True):
            # Gradients are reduced over processes once, with the last micro-batch.
            # (Shards: with each, or every process would hold them whole.)
            alone = part is not parts[-1] and not accelerator.is_fsdp2
            with accelerator.no_sync(module) if alone else nullcontext():
                loss, stats = loss_of(part, part_weights, normalizer)
                accelerator.backward(loss * accelerator.num_processes)  # DDP takes the mean
            all_stats.append(stats)
            values.append(loss.detach().float())
        norm = float(accelerator.clip_grad_norm_(module.parameters(), s.max_grad_norm))
        guard = torch.stack([sum(values), torch.full_like(values[0], norm)])
        finite = accelerator.reduce(guard, "sum").isfinite()  # the same on all processes
        if finite.all():
            optimizer.step()
        else:  # where the losses are finite, the gradient is not, and any of them may have made it
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
        """Minibatches (an optimiser step each) of micro-batches (a forward pass each), as many as
        other processes have, by fillers of mask 0: they would wait for ever for a missing pass."""
        s, device, minibatches = self.settings, self.accelerator.device, []
        for first in range(s.minibatches):
            rows = range(first, len(trajectories), s.minibatches)
            groups = by_budget([len(trajectories[i].ids) for i in rows], s.micro_tokens)
            parts = [collate(trajectories, [rows[i] for i in group], device) for group in groups]
            most = int(self.accelerator.gather(torch.tensor([len(parts)], device=device)).max())
            for _ in range(most - len(parts)):
                parts.append(collate(trajectories, [first], device))
                parts[-1].mask.zero_()
            minibatches.append(parts)
        return minibatches


def build_learner(
    accelerator, settings, model, vocab_size: int, dtype: torch.dtype = torch.float32
) -> Learner:
    """Scorer, critic and optimisers for a policy, prepared by Accelerate. The reference is a whole
    copy, in the type that the run computes in (`dtype`), or the policy with its LoRA off."""
    packed = model.config._attn_implementation == "flash_attention_2"
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    make_scorer = partial(
        Scorer, temperature=settings.temperature, vocab_size=vocab_size, packed=packed
    )

    def prepare(module: nn.Module, lr: float):
        learned = [weight for weight in module.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr, weight_decay=settings.weight_decay)
        return accelerator.prepare(module, optimizer)

    reference = critic = critic_optimizer = None
    if settings.kl_coef and not settings.lora_rank:
        frozen = cast_weights(copy.deepcopy(model), dtype).requires_grad_(False)
        reference = make_scorer(frozen.to(accelerator.device))
    if settings.algorithm == "ppo":  # the critic starts as the policy does (paper appendix F)
        critic = ppo.Critic(copy.deepcopy(model.base_model), packed)
        critic, critic_optimizer = prepare(critic, settings.critic_lr)
    scorer, optimizer = prepare(make_scorer(model), settings.lr)
    if settings.kl_coef and settings.lora_rank:  # `scorer`, each call of it within `lora_off`
        reference = lora_off(model)(lambda *inputs: scorer(*inputs))
    return Learner(accelerator, settings, scorer, optimizer, reference, critic, critic_optimizer)
