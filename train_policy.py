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
from dataclasses import asdict, replace
from pathlib import Path

from minizs import runs
from minizs.config import parse, require, run_script, save, set_threads
from minizs.settings import FREE, PolicyConfig, check

SHOWN = "reward held_out_f1 noise kl entropy searches_per_question seconds".split()  # in the bar


def train(config: PolicyConfig, accelerator, learner, writer, tokenizer, template: str, examples,
          engine, held_out, folder: Path, first: int, asked) -> None:  # fmt: skip
    """The method. `first` is the step to begin with; `held_out()` evaluates, if there is one.

    `writer()` is the model that generates: the trained one, or a fresh copy of it. `asked()` tells
    whether to stop; then, as when the engine is gone for good, what is done is saved first.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from minizs import checkpoint, data, metrics, report, stages
    from minizs.alarms import Alarms
    from minizs.client import ServiceError
    from minizs.curriculum import noise_probability
    from minizs.rollout import rollout

    rank, world = accelerator.process_index, accelerator.num_processes
    count = config.batch_questions * config.group_size
    run, ring = runs.RunFolder(folder), Alarms(runs.read_lines(folder / "metrics.jsonl"))
    skipped = ring.rows[-1]["skipped"] if ring.rows else 0
    steps = tqdm(range(first, config.steps + 1), initial=first - 1, total=config.steps,
                 disable=rank > 0, dynamic_ncols=True)  # fmt: skip

    def save(step: int) -> None:
        if accelerator.is_main_process:
            report.write(folder)
        checkpoint.save(accelerator, folder / "checkpoints", step, config.keep)

    for step in steps:
        started, failure, failed = time.perf_counter(), None, getattr(engine, "failed", 0)
        noise = config.engine_noise
        if config.engine == "simulator":
            noise = noise_probability(step, config.steps, config.noise_start, config.noise_end,
                                      config.noise_base)  # fmt: skip
        batch = data.batch(examples, step, config.batch_questions, config.seed)
        places = range(rank, len(batch), world)  # this process's share of it
        try:
            trajectories = rollout(
                writer(), tokenizer, [examples[batch[place]] for place in places], engine,
                group_size=config.group_size, limits=stages.limits(config), noise=noise,
                temperature=config.temperature, seed=config.seed, template=template,
                keys=[(step, place) for place in places],
            )  # fmt: skip
        except ServiceError as error:
            failure = error
        if metrics.total(accelerator, failure is not None):  # all leave when one has to
            save(step - 1)
            raise failure or SystemExit(1)
        rolled_out = time.perf_counter()
        set_learning_rates(config, learner, step)
        figures = {"step": step, "noise": noise, "processes": world}
        figures |= metrics.of_trajectories(accelerator, trajectories) | learner.update(trajectories)
        if figures["skipped"]:
            suspects = gather_object([asdict(trajectories[i]) for i in sorted(learner.suspects)])
            run.write_trajectories(step, suspects if rank == 0 else [], "suspects")
        skipped = figures["skipped"] = figures["skipped"] + skipped
        figures["queries"] = round(figures["searches_per_question"] * count)
        failed = getattr(engine, "failed", 0) - failed
        figures["search_errors"] = metrics.total(accelerator, failed)
        figures["seconds_rollout"] = rolled_out - started
        figures["seconds_update"] = time.perf_counter() - rolled_out
        figures["seconds"] = time.perf_counter() - started
        figures["tokens_per_second"] = figures["trajectory_tokens"] * count / figures["seconds"]
        if held_out and (step == config.steps or step % config.eval_every == 0):
            started = time.perf_counter()
            figures |= {f"held_out_{name}": value for name, value in held_out().items()}
            figures["seconds_test"] = time.perf_counter() - started
        if accelerator.is_main_process:
            # One of each group, then, if more are wanted, another of each.
            shown = sorted(range(len(trajectories)), key=lambda i: i % config.group_size)
            shown = [asdict(trajectories[i]) | learner.tokens(i, trajectories[i], tokenizer)
                     for i in shown[: config.log_trajectories]]  # fmt: skip
            run.write_metrics(figures)
            run.write_trajectories(step, shown)
            steps.set_postfix({name: f"{figures[name]:.2f}" for name in SHOWN if name in figures})
            for sentence in ring(figures):
                tqdm.write(f"Step {step}: {sentence}")
        accelerator.log(figures, step=step)
        due = config.save_every and (step == config.steps or step % config.save_every == 0)
        stop, broken = asked(accelerator), skipped > config.max_skipped
        if due or stop or broken:
            save(step)
        if (stop or broken) and rank:  # the main process says why
            raise SystemExit(1)
        require(not broken, f"{skipped} steps had a loss or gradient that is not finite; {folder}/"
                "suspects.jsonl holds their trajectories. Lower --lr or "
                "raise --max_skipped.")  # fmt: skip
        if stop:
            launch = f"accelerate launch --num_processes {world}" if world > 1 else "python"
            raise SystemExit(f"Stopped after step {step}, which is saved. Go on with: {launch} "
                             f"train_policy.py --output {folder} --resume")  # fmt: skip


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
        runs.check_unchanged(folder, config, FREE)
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
        if config.resume == "latest" and Path(config.output, runs.DONE).is_file():
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
    done = checkpoint.load(accelerator, resumed) if resumed else 0
    if main_process:
        print(f"Going on from step {done} of {folder}." if resumed else f"A new run in {folder}.")
        run = runs.RunFolder(folder, config.overwrite)
        (folder / runs.DONE).unlink(missing_ok=True)  # the run is not complete any more
        checkpoint.cut(folder / "checkpoints", done)
        run.cut(done)
        again = replace(config, output="", resume="", overwrite=False)  # fed back: a new run
        save(again, folder / "config.partial")
        (folder / "config.partial").replace(folder / "config.yaml")
    accelerator.wait_for_everyone()
    if config.log_with:
        accelerator.log_with = [config.log_with]
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.init_trackers("minizs", asdict(config))
    with checkpoint.stopping() as asked:
        train(config, accelerator, learner, writer, tokenizer, template, examples, engine, held_out,
              folder, done + 1, asked)  # fmt: skip
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
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
