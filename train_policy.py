"""Stage 2: teach a language model to search, by reinforcement learning against a simulated engine.

    accelerate launch train_policy.py                   # the tiny world, offline, on any machine
    accelerate launch train_policy.py --algorithm ppo --steps 100 --seed 2
    python train_policy.py --help

The loop in `train` is the whole method (arXiv 2505.04588): the curriculum sets how noisy the
simulator is, a batch of questions is rolled out, F1 rewards the answers, one update is made.
What a trajectory, a reward or an update is, the modules in minizs/ say, one idea each.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from minizs import runs
from minizs.config import check_ranges, option, parse, require, run_script, save, set_threads
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
    micro_tokens: int = option(8192, "Positions in a forward pass, padding too: bounds memory.")
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
    log_trajectories: int = option(8, "Trajectories a step that are written to trajectories.jsonl.")


def check(config: PolicyConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    check_ranges(
        config,
        positive="steps batch_questions group_size temperature lr minibatches micro_tokens keep "
        "max_grad_norm critic_lr noise_base eval_questions clip_low clip_high value_clip",
        not_negative="kl_coef entropy_coef weight_decay eval_every save_every log_trajectories "
        "lora_rank search_price gpu_price",
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
    check_search(config)
    if config.output:
        runs.check_free(Path(config.output), bool(config.resume), config.overwrite)


def train(config: PolicyConfig, accelerator, learner, writer, tokenizer, template: str, examples,
          engine, held_out, folder: Path, first: int) -> None:  # fmt: skip
    """The method. `first` is the step to begin with; `held_out()` evaluates, if there is one.

    `writer()` is the model that generates: the trained one, or a fresh copy of it.
    """
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    from minizs import checkpoint, data, metrics, report, stages
    from minizs.curriculum import noise_probability
    from minizs.rollout import rollout

    rank, world = accelerator.process_index, accelerator.num_processes
    run = runs.RunFolder(folder)

    def due(step: int) -> bool:
        return bool(held_out) and (step == config.steps or step % config.eval_every == 0)

    def test() -> None:
        started = time.perf_counter()
        figures = {f"held_out_{name}": value for name, value in held_out().items()}
        if accelerator.is_main_process:
            run.amend_metrics(figures | {"seconds_test": time.perf_counter() - started})

    tested = ["held_out_f1" in row for row in runs.read_lines(folder / "metrics.jsonl")[-1:]]
    if due(first - 1) and broadcast_object_list([tested])[0] == [False]:
        test()  # which the run that is resumed did not live to do
    steps = tqdm(range(first, config.steps + 1), initial=first - 1, total=config.steps,
                 disable=not accelerator.is_main_process, dynamic_ncols=True)  # fmt: skip
    for step in steps:
        started = time.perf_counter()
        noise = config.engine_noise
        if config.engine == "simulator":
            noise = noise_probability(step, config.steps, config.noise_start, config.noise_end,
                                      config.noise_base)  # fmt: skip
        batch = data.batch(examples, step, config.batch_questions, config.seed)
        places = range(rank, len(batch), world)  # this process's share of it
        trajectories = rollout(
            writer(), tokenizer, [examples[batch[place]] for place in places], engine,
            group_size=config.group_size, limits=stages.limits(config), noise=noise,
            temperature=config.temperature, seed=config.seed, template=template,
            keys=[(step, place) for place in places],
        )  # fmt: skip
        rolled_out = time.perf_counter()
        set_learning_rates(config, learner, step)
        figures = {"step": step, "noise": noise, "processes": world}
        figures |= metrics.of_trajectories(accelerator, trajectories) | learner.update(trajectories)
        count = config.batch_questions * config.group_size
        figures["queries"] = round(figures["searches_per_question"] * count)
        figures["seconds_rollout"] = rolled_out - started
        figures["seconds_update"] = time.perf_counter() - rolled_out
        figures["seconds"] = time.perf_counter() - started
        steps.set_postfix({name: f"{figures[name]:.2f}" for name in
                           ("reward", "noise", "searches_per_question", "seconds")})  # fmt: skip
        if accelerator.is_main_process:
            run.write_metrics(figures)
            # One of each group, then, if more are wanted, another of each.
            shown = sorted(range(len(trajectories)), key=lambda i: i % config.group_size)
            shown = [trajectories[i] for i in shown[: config.log_trajectories]]
            run.write_trajectories(step, shown)
        if config.save_every and (step == config.steps or step % config.save_every == 0):
            checkpoint.save(accelerator, folder / "checkpoints", step, config.keep,
                            kind(config, accelerator))  # fmt: skip
            if accelerator.is_main_process:
                report.write(folder)
        if due(step):  # after the checkpoint: an evaluation that fails loses nothing
            test()


def kind(config: PolicyConfig, accelerator) -> dict:
    """What a checkpoint and the run that goes on from it have to agree on."""
    return {"algorithm": config.algorithm, "lora_rank": config.lora_rank,
            "sharded": accelerator.is_fsdp2}  # fmt: skip


def set_learning_rates(config: PolicyConfig, learner, step: int) -> None:
    """Linear warm-up over the first `warmup` of the steps, under a line that falls to `lr_end`."""
    rise = step / max(1, round(config.warmup * config.steps))
    share = min(1.0, rise) * (1 - (1 - config.lr_end) * step / config.steps)
    pairs = ((learner.optimizer, config.lr), (learner.critic_optimizer, config.critic_lr))
    for optimizer, lr in pairs:
        for group in optimizer.param_groups if optimizer else ():
            group["lr"] = lr * share


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    config = parse(PolicyConfig, argv)
    if config.resume:  # with the run's own settings, where the flags are silent
        folder = runs.to_resume("policy", config.output, config.resume)
        config = parse(PolicyConfig, [*runs.own_settings(folder), *argv])
        config.output = str(folder)
    check(config)
    set_threads(config.threads)
    import torch

    from minizs import adapters, checkpoint, cost, data, models, report, stages
    from minizs.learner import build_learner
    from minizs.protocol import vocabulary_size
    from minizs.replica import Writer

    accelerator = stages.make_accelerator(config)
    main_process, world = accelerator.is_main_process, accelerator.num_processes
    require(config.batch_questions % world == 0, f"--batch_questions {config.batch_questions} does "
            f"not split over {world} processes.")  # fmt: skip
    examples = data.load(config.data, "train", accelerator.print)
    resumed = None
    if config.resume:
        resumed = checkpoint.find(config.resume, Path(config.output, "checkpoints"))
        if config.resume == "latest" and runs.finished(Path(config.output), config.steps):
            return accelerator.print(f"The run in {config.output} is complete.")
    stages.check_prompts(config, config.policy, examples)
    if config.engine == "simulator":
        stages.check_simulator(config, examples)
    dtype = stages.compute_dtype(config)
    weights = dtype if config.lora_rank else torch.float32  # what the optimiser changes: float32
    model, tokenizer = stages.load(config, config.policy, torch.device("cpu"), weights)
    accelerator.print(f"Attention by {model.config._attn_implementation}, computed in {dtype}.")
    if config.lora_rank:
        adapters.add(model, config.lora_rank, config.seed)
    template = models.load_prompt(config.policy)
    engine = stages.build_engine(config, "train", accelerator)
    writer = Writer(model, dtype, accelerator.device, sharded=accelerator.is_fsdp2)
    held_out = stages.held_out(config, accelerator, writer, tokenizer, template)

    learner = build_learner(accelerator, config, model, vocabulary_size(tokenizer), dtype)
    folder = stages.agreed_folder(accelerator, config, "policy")
    done = checkpoint.load(accelerator, resumed, kind(config, accelerator)) if resumed else 0
    if main_process:
        print(f"Going on from step {done} of {folder}." if resumed else f"A new run in {folder}.")
        runs.RunFolder(folder, config.overwrite).cut(done)
        checkpoint.cut(folder / "checkpoints", done)
        again = replace(config, output="", resume="", overwrite=False)  # fed back: a new run
        save(again, folder / "config.yaml")
    accelerator.wait_for_everyone()
    train(config, accelerator, learner, writer, tokenizer, template, examples, engine, held_out,
          folder, done + 1)  # fmt: skip
    final = writer()
    if main_process:
        if config.merge:
            models.save(final, tokenizer, folder / "adapter")
            base, _ = stages.load(config, config.policy, torch.device("cpu"), dtype)
            final = adapters.merged(base, folder / "adapter")
        models.save(final, tokenizer, folder / "policy", prompt=template)
        report.write(folder)
        lines = runs.read_lines(folder / "metrics.jsonl")
        spent = cost.of_run(lines, config.search_price, config.gpu_price)
        (folder / "cost.json").write_text(json.dumps(spent, indent=1) + "\n")
        print(cost.describe(spent))
        print(f"The policy is in {folder / 'policy'} and {folder / 'report.html'} shows the run. "
              f"Test it: python evaluate.py --policy {folder / 'policy'}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
