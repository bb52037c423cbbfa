"""The settings of train_policy.py, and what is wrong with them. No torch."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from minizs import runs
from minizs.config import check_ranges, option, require
from minizs.options import SearchConfig, check_search


@dataclass
class PolicyConfig(SearchConfig):
    resume: str = option("", "Go on from the newest checkpoint, or the one named.", bare="latest")
    algorithm: str = option("grpo", "How rewards become advantages.", ("grpo", "ppo", "reinforce"))
    steps: int = option(100, "Training steps; each is one batch of rollouts.")
    batch_questions: int = option(16, "Questions a step, over all processes.")
    group_size: int = option(8, "Trajectories a question.")

    noise_start: float = option(0.0, "Probability of noisy documents at the first step.")
    noise_end: float = option(0.25, "The same at the last step.")
    noise_base: float = option(4.0, "The curriculum's base; 1 is a straight line.")

    lr: float = option(1.5e-3, "Peak learning rate of the policy (AdamW).")
    lr_end: float = option(0.1, "Share of the peak that is left at the last step; 1: constant.")
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises to its peak.")
    weight_decay: float = option(0.0, "AdamW's.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    lora_rank: int = option(0, "Train a LoRA of this rank, not all weights; 0: all.")
    merge: bool = option(False, "With LoRA: make the final policy a plain model.")
    gradient_checkpointing: bool = option(False, "Less memory, a third more work in the update.")
    minibatches: int = option(1, "Optimiser steps a batch of rollouts.")
    micro_tokens: int = option(2048, "Positions in a forward pass, padding too: bounds memory.")
    clip_low: float = option(0.2, "The ratio is clipped below 1 minus this.")
    clip_high: float = option(0.28, "And above 1 plus this (clip-higher, arXiv 2503.14476).")
    ratio_level: str = option("token", "'sequence' is GSPO, arXiv 2507.18071.",
                              ("token", "sequence"))  # fmt: skip
    loss_average: str = option("token", "How tokens are averaged; 'constant' is Dr. GRPO's.",
                               ("token", "sequence", "constant"))  # fmt: skip
    kl_coef: float = option(0.02, "Weight of the KL to the starting model; 0 turns it off.")
    kl_kind: str = option("k3", "KL estimator in the loss; PPO has k1 in the reward.", ("k2", "k3"))
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.")
    advantage_scale: str = option("group", "GRPO: divide by this deviation; 'none' is Dr. GRPO.",
                                  ("group", "batch", "none"))  # fmt: skip
    baseline: str = option("leave_one_out", "REINFORCE: subtracted from the reward.",
                           ("leave_one_out", "mean", "none"))  # fmt: skip
    critic_lr: float = option(1e-3, "PPO: learning rate of the critic.")
    value_clip: float = option(0.5, "PPO: how far a value may move in an update.")
    gamma: float = option(1.0, "PPO: discount a token.")
    lam: float = option(1.0, "PPO: GAE's lambda.")

    eval_every: int = option(20, "Steps between evaluations on held-out questions; 0: never.")
    eval_questions: int = option(200, "Held-out questions, answered greedily with BM25.")
    save_every: int = option(20, "Steps between checkpoints; 0: only the final model.")
    keep: int = option(2, "Checkpoints kept.")
    search_price: float = option(9.17, "Dollars for 1,000 queries to a web engine (paper Table 8: "
                                 "586.7 for 64,000).")  # fmt: skip
    gpu_price: float = option(1.47, "Dollars for an hour of a GPU (paper Table 8).")
    max_skipped: int = option(10, "Steps that may be skipped, their loss or gradient not finite.")
    log_trajectories: int = option(8, "Trajectories a step that are written to trajectories.jsonl.")
    log_with: str = option("", "Also log to this, where its package is installed.",
                           ("", "tensorboard", "wandb", "trackio"))  # fmt: skip


# What a resumed run may have otherwise: its training would not be another.
FREE = {
    *"""output resume overwrite threads save_every keep eval_every eval_questions merge log_with
    log_trajectories max_skipped search_price gpu_price timeout retries on_search_error cache
    engine_url simulator_device micro_tokens gradient_checkpointing""".split()
}


def check(config: PolicyConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    check_ranges(
        config,
        positive="steps batch_questions group_size temperature lr minibatches micro_tokens keep "
        "max_grad_norm critic_lr noise_base eval_questions clip_low clip_high value_clip",
        not_negative="kl_coef entropy_coef weight_decay eval_every save_every log_trajectories "
        "lora_rank search_price gpu_price max_skipped",
        share="noise_start noise_end warmup lr_end gamma lam",
    )
    compares = {"grpo": True, "ppo": False, "reinforce": config.baseline != "none"}
    require(config.group_size > 1 or not compares[config.algorithm], "--algorithm "
            f"{config.algorithm} compares a question's trajectories: "
            "give --group_size 2 or more.")  # fmt: skip
    # So that every minibatch, on every process, has equal parts of each group.
    require(config.group_size % config.minibatches == 0, f"--minibatches {config.minibatches} "
            f"does not divide --group_size {config.group_size}.")  # fmt: skip
    require(config.engine != "simulator" or not config.engine_noise, "--engine_noise is for real "
            "engines; the simulator has --noise_start and --noise_end.")  # fmt: skip
    require(not (config.resume and config.overwrite),
            "--resume goes on with a run, --overwrite deletes it; give only one.")  # fmt: skip
    require(bool(config.lora_rank) or not config.merge, "--merge is for --lora_rank N.")
    require(not Path(config.policy, "adapter_config.json").is_file(), f"{config.policy} is a LoRA, "
            "which cannot be trained further; make it with --merge.")  # fmt: skip
    require(not config.log_with or find_spec(config.log_with) is not None, "--log_with "
            f"{config.log_with} needs its package: pip install {config.log_with}.")  # fmt: skip
    check_search(config)
    if config.output:
        runs.check_free(Path(config.output), bool(config.resume), config.overwrite)
