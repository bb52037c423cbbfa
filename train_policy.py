"""Stage 2: teach a language model to search, by reinforcement learning against a simulated engine.

    accelerate launch train_policy.py --algorithm ppo   # the tiny world, offline, on any machine

The loop in `train` is the whole method (arXiv 2505.04588): the curriculum sets how noisy the
simulator is, a batch of questions is rolled out, F1 rewards the answers, one update is made."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

from minizs import require
from minizs.runs import run_folder
from minizs.runs.flags import may_change, parse, run_script, save_settings, set_threads
from minizs.runs.settings import PolicyConfig, check_training

SHOWN = "reward searches_per_question held_out_f1 kl noise entropy".split()  # in the bar


def train(
    config: PolicyConfig,
    accelerator,
    learner,
    writer,
    tokenizer,
    template: str,
    examples,
    engine,
    held_out,
    folder: Path,
    first: int,
    asked,
) -> None:
    """The method, from step `first` on. `writer()` is the model that generates: the trained one or
    a fresh copy of it. `held_out()` evaluates, if there is one. Where `asked()` says to stop, or
    the engine is gone for good, what is done is saved first."""
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from minizs.curriculum import noise_probability
    from minizs.engines.client import ServiceError
    from minizs.reward import f1_score
    from minizs.rollout import rollout
    from minizs.runs import build, checkpoint, data, metrics, page
    from minizs.runs.alarms import alarms

    rank, world = accelerator.process_index, accelerator.num_processes
    rows, rung = run_folder.read_lines(folder / "metrics.jsonl"), set()
    skipped, count = rows[-1]["skipped"] if rows else 0, config.batch_questions * config.group_size
    steps = tqdm(
        range(first, config.steps + 1),
        initial=first - 1,
        total=config.steps,
        disable=rank > 0,
        dynamic_ncols=True,
    )

    def save_run(step: int) -> None:
        if rank == 0:
            page.write_page(folder)
        checkpoint.save(accelerator, folder, step, config.keep)

    for step in steps:
        started, failure, failed = time.perf_counter(), None, getattr(engine, "failed", 0)
        noise = config.engine_noise
        if config.engine == "simulator":
            noise = noise_probability(
                step, config.steps, config.noise_start, config.noise_end, config.noise_base
            )
        batch = data.batch(examples, step, config.batch_questions, config.seed)
        places = range(rank, len(batch), world)  # this process's share of it
        try:
            policy = build.make_policy(config, writer(), tokenizer, template, config.temperature)
            trajectories = rollout(
                policy,
                [examples[batch[place]] for place in places],
                engine,
                group_size=config.group_size,
                noise=noise,
                keys=[(step, place) for place in places],
            )
        except ServiceError as error:
            failure = error
        if metrics.total(accelerator, failure is not None):  # all leave when one has to
            save_run(step - 1)
            raise failure or SystemExit(1)
        for trajectory in trajectories:
            trajectory.reward = f1_score(trajectory.answer, trajectory.example.answers)
        rolled_out = time.perf_counter()
        set_learning_rates(config, learner, step)
        figures = {"step": step, "noise": noise, "processes": world}
        figures |= metrics.of_trajectories(accelerator, trajectories) | learner.update(trajectories)
        if figures["skipped"]:
            suspects = [{"step": step} | asdict(trajectories[i]) for i in sorted(learner.suspects)]
            suspects = gather_object(suspects)
            run_folder.write_lines(folder / "suspects.jsonl", suspects if rank == 0 else [])
        skipped = figures["skipped"] = figures["skipped"] + skipped
        figures["queries"] = round(figures["searches_per_question"] * count)
        figures["search_errors"] = metrics.total(accelerator, getattr(engine, "failed", 0) - failed)
        figures["seconds_rollout"] = rolled_out - started
        figures["seconds_update"] = time.perf_counter() - rolled_out
        figures["seconds"] = time.perf_counter() - started
        figures["tokens_per_second"] = figures["trajectory_tokens"] * count / figures["seconds"]
        if held_out and (step == config.steps or step % config.eval_every == 0):
            started = time.perf_counter()
            figures |= {f"held_out_{name}": value for name, value in held_out().items()}
            figures["seconds_test"] = time.perf_counter() - started
        if rank == 0:
            # One of each group, then, if more are wanted, another of each.
            shown = sorted(range(len(trajectories)), key=lambda i: i % config.group_size)
            shown = [
                {"step": step} | asdict(t := trajectories[i]) | learner.tokens(i, t, tokenizer)
                for i in shown[: config.log_trajectories]
            ]
            run_folder.write_lines(folder / "metrics.jsonl", [figures])
            run_folder.write_lines(folder / "trajectories.jsonl", shown)
            steps.set_postfix({name: f"{figures[name]:.2f}" for name in SHOWN if name in figures})
            rows = [*rows[-499:], figures]
            for sentence in alarms(rows, rung):
                tqdm.write(f"Step {step}: {sentence}")
        accelerator.log({name: figures[name] for name in figures if name != "step"}, step=step)
        due = config.save_every and (step == config.steps or step % config.save_every == 0)
        stop, broken = asked(accelerator), skipped > config.max_skipped
        if due or stop or broken:
            save_run(step)
        require(
            not broken,
            f"{skipped} steps had a loss or gradient that is not finite; "
            f"{folder}/suspects.jsonl has them; lower --lr, raise --max_skipped.",
        )
        if stop:
            raise SystemExit(
                rank
                or f"Stopped after step {step}, which is saved. Go on with: "
                f"train_policy.py --output {folder} --resume"
            )


def set_learning_rates(config: PolicyConfig, learner, step: int) -> None:
    """Linear warm-up over the first `warmup` of the steps, under a line that falls to `lr_end`."""
    rise = step / max(1, round(config.warmup * config.steps))
    share = min(1.0, rise) * (1 - (1 - config.lr_end) * step / config.steps)
    pairs = ((learner.optimizer, config.lr), (learner.critic_optimizer, config.critic_lr))
    for optimizer, lr in pairs:
        for group in optimizer.param_groups if optimizer else ():
            group["lr"] = lr * share


def main(argv: list[str]) -> None:
    config = parse(PolicyConfig, argv)
    if config.resume:  # with the run's own settings, where the flags are silent
        folder = run_folder.to_resume(config.output, config.resume)
        config = parse(PolicyConfig, argv, folder / "config.yaml")
        run_folder.check_unchanged(folder, config, may_change(config))
        config.output = str(folder)
    check_training(config)
    set_threads(config.threads)
    import torch

    from minizs.learner import build_learner
    from minizs.models import loading, lora
    from minizs.models.weights import make_writer
    from minizs.protocol import vocabulary_size
    from minizs.runs import build, checkpoint, data, metrics, page

    accelerator = build.make_accelerator(config)
    require(
        config.batch_questions % accelerator.num_processes == 0,
        f"--batch_questions {config.batch_questions} does not split over the processes.",
    )
    examples = data.load_examples(config.data, "train", accelerator.print)
    resumed = checkpoint.find(config.resume, Path(config.output)) if config.resume else None
    if config.resume == "latest" and Path(config.output, run_folder.DONE).is_file():
        return accelerator.print(f"The run in {config.output} is complete.")
    build.check_lengths(config, [config.policy], examples)
    dtype = build.compute_dtype(config)
    weights = dtype if config.lora_rank else torch.float32  # what the optimiser changes: float32
    model, tokenizer = build.load(config, config.policy, torch.device("cpu"), weights)
    accelerator.print(f"Attention by {model.config._attn_implementation}, computed in {dtype}.")
    if config.lora_rank:
        lora.add_lora(model, config.lora_rank, config.seed)
    template = loading.load_prompt(config.policy)
    engine = build.build_engine(config, "train", accelerator, examples)
    writer = make_writer(model, dtype, accelerator.device, accelerator.is_fsdp2)
    held_out = build.held_out(config, accelerator, writer, tokenizer, template)
    learner = build_learner(accelerator, config, model, vocabulary_size(tokenizer), dtype)
    folder = build.agreed_folder(accelerator, config)
    done = checkpoint.load(accelerator, resumed) if resumed else 0
    if accelerator.is_main_process:
        print(f"Going on from step {done} of {folder}." if resumed else f"A new run in {folder}.")
        run_folder.begin(folder, done, config.overwrite)
        (folder / "metrics.jsonl").touch()  # which tells a run, see `run_folder.is_run`
        (folder / run_folder.DONE).unlink(missing_ok=True)  # the run is not complete any more
        again = replace(config, output="", resume="", overwrite=False)  # fed back: a new run
        save_settings(again, folder / "config.partial")
        (folder / "config.partial").replace(folder / "config.yaml")
    accelerator.wait_for_everyone()
    if config.log_with:
        accelerator.log_with = [config.log_with]
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.init_trackers("minizs", asdict(config))
    try:
        with checkpoint.stopping() as asked:
            train(
                config,
                accelerator,
                learner,
                writer,
                tokenizer,
                template,
                examples,
                engine,
                held_out,
                folder,
                done + 1,
                asked,
            )
    finally:
        for tracker in accelerator.trackers:  # not end_training(), in which two processes can hang
            tracker.finish()
    final = writer()
    if accelerator.is_main_process:
        if config.merge:
            loading.save_model(final, tokenizer, folder / "adapter")
            base, _ = build.load(config, config.policy, torch.device("cpu"), dtype)
            final = lora.merge_lora(base, folder / "adapter")
        page.write_page(folder)
        lines = run_folder.read_lines(folder / "metrics.jsonl")
        spent = metrics.cost(lines, config.search_price, config.gpu_price)
        (folder / "cost.json").write_text(json.dumps(spent, indent=1) + "\n", encoding="utf-8")
        run_folder.remember_training(folder / "policy", config)
        loading.save_model(
            final, tokenizer, folder / "policy", prompt=template
        )  # last: `run_folder.DONE`
        print(metrics.COST.format(**spent))
        print(
            f"The policy is in {folder / 'policy'} and {folder / 'report.html'} shows the run. "
            f"Test it: python evaluate.py --policy {folder / 'policy'}"
        )


if __name__ == "__main__":
    run_script(main)
