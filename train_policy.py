"""Stage 2: teach a language model to search, by reinforcement learning against a simulated engine.

    accelerate launch train_policy.py                   # the tiny world, offline, on any machine
    accelerate launch train_policy.py --algorithm ppo --steps 100 --seed 2
    python train_policy.py --help

The loop in `train` is the whole method (arXiv 2505.04588): the curriculum sets how noisy the
simulator is, a batch of questions is rolled out, F1 rewards the answers, one update is made.
What a trajectory, a reward or an update is, the modules in minizs/ say, one idea each.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from minizs import runs
from minizs.config import check_ranges, option, parse, require, run_script, save, set_threads

ENGINES = ("simulator", "bm25")


@dataclass
class PolicyConfig:
    policy: str = option("tiny", "The model to train: 'tiny' (shipped), a folder or a hub name.")
    simulator: str = option("", "Its folder; empty: runs/simulator, made if it is missing.")
    data: str = option("world", "Questions: 'world' or a .jsonl, .json or .parquet file, of which "
                       "one in ten is held out.")  # fmt: skip
    corpus: str = option("", "For BM25 on your own data: a text file with one document a line; "
                         "without it nothing is evaluated while it trains.")  # fmt: skip
    output: str = option("", "The run's folder; empty: a new runs/policy-N.")
    overwrite: bool = option(False, "Delete what the output folder holds.")
    resume: str = option("", "Go on from the newest checkpoint, or the one named.", bare="latest")
    algorithm: str = option("grpo", "How rewards become advantages.", ("grpo", "ppo", "reinforce"))
    steps: int = option(100, "Training steps; each is one batch of rollouts.")
    seed: int = option(0, "Decides every random number of the run.")
    batch_questions: int = option(16, "Questions a step, over all processes.")
    group_size: int = option(8, "Trajectories a question.")

    engine: str = option("simulator", "What answers the searches in training.", ENGINES)
    noise_start: float = option(0.0, "Probability of noisy documents at the first step.")
    noise_end: float = option(0.25, "The same at the last step.")
    noise_base: float = option(4.0, "The curriculum's base; 1 is a straight line.")
    engine_noise: float = option(0.0, "How often a real engine's reply lacks what is needed.")
    top_k: int = option(3, "Documents a search.")
    simulator_temperature: float = option(0.8, "At which the simulator writes.")
    max_turns: int = option(6, "Generations a trajectory; there are at most one fewer searches.")
    max_turn_tokens: int = option(40, "Tokens the policy may write in a turn.")
    max_document_tokens: int = option(80, "Tokens of an engine's reply, tags included.")
    max_context: int = option(448, "Tokens of a whole trajectory.")
    temperature: float = option(1.0, "At which the policy samples, and is scored.")

    lr: float = option(1.5e-3, "Peak learning rate of the policy (AdamW).")
    lr_end: float = option(0.1, "Share of the peak that is left at the last step; 1: constant.")
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises to its peak.")
    weight_decay: float = option(0.0, "AdamW's.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
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
    log_trajectories: int = option(8, "Trajectories a step that are written to trajectories.jsonl.")
    threads: int = option(0, "CPU threads a process; 0: all cores, shared by the processes.")


def check(config: PolicyConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    from minizs import data, models, stages

    check_ranges(
        config,
        positive="steps batch_questions group_size top_k max_turns max_turn_tokens temperature lr "
        "max_document_tokens max_context minibatches micro_tokens max_grad_norm critic_lr keep "
        "noise_base eval_questions clip_low clip_high value_clip",
        not_negative="kl_coef entropy_coef weight_decay eval_every save_every log_trajectories "
        "threads simulator_temperature",
        share="noise_start noise_end engine_noise warmup lr_end gamma lam",
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
    models.check_model(config.policy)
    models.check_positions(config.policy, config.max_context)
    data.check(config.data)
    stages.check_engine(config)
    if config.output:
        runs.check_free(Path(config.output), bool(config.resume), config.overwrite)


def train(config: PolicyConfig, accelerator, learner, model, tokenizer, template: str, examples,
          engine, held_out, folder: Path, first: int) -> None:  # fmt: skip
    """The method. `first` is the step to begin with; `held_out()` evaluates, if there is one."""
    from tqdm import tqdm

    from minizs import checkpoint, data, metrics, report, stages
    from minizs.curriculum import noise_probability
    from minizs.rollout import rollout

    rank, world = accelerator.process_index, accelerator.num_processes
    run = runs.RunFolder(folder)
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
            model, tokenizer, [examples[batch[place]] for place in places], engine,
            group_size=config.group_size, limits=stages.limits(config), noise=noise,
            temperature=config.temperature, seed=config.seed, template=template,
            keys=[(step, place) for place in places],
        )  # fmt: skip
        rolled_out = time.perf_counter()
        set_learning_rates(config, learner, step)
        figures = {"step": step, "noise": noise}
        figures |= metrics.of_trajectories(accelerator, trajectories) | learner.update(trajectories)
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
        last = step == config.steps
        if config.save_every and (last or step % config.save_every == 0):
            checkpoint.save(accelerator, folder / "checkpoints", step, config.keep)
            if accelerator.is_main_process:
                report.write(folder)
        # After the checkpoint: an evaluation that fails loses nothing.
        if held_out and (last or step % config.eval_every == 0):
            figures = {f"held_out_{name}": value for name, value in held_out().items()}
            figures["seconds"] = time.perf_counter() - started
            if accelerator.is_main_process:
                run.amend_metrics(figures)


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
    from accelerate import Accelerator

    from minizs import checkpoint, data, models, report, stages
    from minizs.learner import build_learner

    accelerator = Accelerator()
    main_process = accelerator.is_main_process
    split = config.batch_questions % accelerator.num_processes == 0
    require(split, f"--batch_questions {config.batch_questions} does not split over "
            f"{accelerator.num_processes} processes.")  # fmt: skip
    examples = data.load(config.data, "train")
    resumed = None
    if config.resume:
        resumed = checkpoint.find(config.resume, Path(config.output, "checkpoints"))
        if config.resume == "latest" and runs.finished(Path(config.output), config.steps):
            return accelerator.print(f"The run in {config.output} is complete.")
    stages.check_prompts(config.policy, examples, config.max_context)
    if config.engine == "simulator":
        stages.check_simulator(config, examples)
    model, tokenizer = models.load(config.policy, accelerator.device)
    template = models.load_prompt(config.policy)
    engine = stages.training_engine(config, accelerator)
    held_out = stages.held_out(config, accelerator, model, tokenizer, template)

    learner = build_learner(accelerator, config, model, len(tokenizer))
    folder = stages.agreed_folder(accelerator, config, "policy")
    done = checkpoint.load(accelerator, resumed) if resumed else 0
    if main_process:
        print(f"Going on from step {done} of {folder}." if resumed else f"A new run in {folder}.")
        runs.RunFolder(folder, config.overwrite).cut(done)
        checkpoint.cut(folder / "checkpoints", done)
        again = replace(config, output="", resume="", overwrite=False)  # fed back: a new run
        save(again, folder / "config.yaml")
    accelerator.wait_for_everyone()
    train(config, accelerator, learner, model, tokenizer, template, examples, engine, held_out,
          folder, done + 1)  # fmt: skip
    if main_process:
        models.save(model, tokenizer, folder / "policy", prompt=template)
        report.write(folder)
        print(f"The policy is in {folder / 'policy'} and {folder / 'report.html'} shows the run. "
              f"Test it: python evaluate.py --policy {folder / 'policy'}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
