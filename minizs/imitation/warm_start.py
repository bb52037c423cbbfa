"""A warm start: the policy imitates demonstrations before it learns from rewards.

A small or a plain base model may never write a tag by itself; then all rewards are 0, and there is
nothing to reinforce. Some dozens of supervised steps teach it the form. The result is a model
folder, `RUN/warm_start/policy`: reinforcement learning starts from that one as from any other, and
its KL is to that one.

    RUN/warm_start/demonstrations.jsonl    what is imitated, with its tokens
    RUN/warm_start/metrics.jsonl           the loss of each step
    RUN/warm_start/checkpoints/            while it trains
    RUN/warm_start/report.json             on held-out demonstrations, before and after
    RUN/warm_start/policy/                 the result; written last

Each of them is made once: a run that was stopped or killed goes on after the last whole one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from minizs import UserError, sft
from minizs.curriculum import mean_noise
from minizs.engines.client import ServiceError
from minizs.evaluation.scores import answer_all, from_row, summary
from minizs.imitation import supervised
from minizs.imitation.demonstrations import read_demonstrations, select, split_held_out
from minizs.imitation.plain_searcher import search_plainly
from minizs.models import flash, loading, lora, weights
from minizs.rollout import Policy, rollout
from minizs.runs import build, checkpoint, run_folder
from minizs.runs.advice import command
from minizs.runs.settings import OWN, SCRIPTED, PolicyConfig
from minizs.trajectory import Example, Trajectory

PLAYED = 50  # held-out questions that the policy answers before and after, at most


@dataclass
class Student:
    """The policy that imitates."""

    policy: Policy
    module: Any = None  # its `sft.Supervised`, once Accelerate has prepared it
    optimizer: Any = None  # likewise


def warm_start(
    config: PolicyConfig,
    accelerator,
    policy: Policy,
    engine,
    examples: Sequence[Example],
) -> str:
    """The folder of a policy's model after supervised steps. It is made in the run's output if it
    is not there.

    `policy` is that of the settings, greedy, its model on the CPU. `engine` is the training
    engine, and `examples` are the questions that "scripted" and "own" answer with it. Raises
    UserError for demonstrations that cannot be used, and SystemExit, with the command that goes on,
    after a signal. Afterwards Accelerate has nothing prepared.
    """
    folder = Path(config.output) / "warm_start"
    result = str(folder / "policy")
    if Path(result, "prompt.txt").is_file():
        return result
    folder.mkdir(parents=True, exist_ok=True)
    student = Student(policy)
    demonstrations = load_demonstrations(config, accelerator, student, engine, examples, folder)
    train, held_out = split_held_out(demonstrations, config.warm_start_held_out)
    writer = prepare_student(config, accelerator, student)

    saved = checkpoint.find_checkpoint("latest", folder)
    last_step = supervised.start_or_resume(accelerator, folder, config, saved)
    report = load_report(folder) if saved else {}
    if held_out and not report:
        report["before"] = measure(accelerator, student, writer, engine, held_out, config)
        save_report(accelerator, folder, report)
    supervised.train(
        warm_start_schedule(config),
        accelerator,
        student.module,
        student.optimizer,
        [tokens_of(trajectory) for trajectory in train],
        folder,
        last_step,
        resume_command(config),
    )
    if held_out:
        report["after"] = measure(accelerator, student, writer, engine, held_out, config)
        save_report(accelerator, folder, report)
        if accelerator.is_main_process:
            print(describe(report, len(train), len(held_out)))
    save_student(config, accelerator, student, writer, folder)
    accelerator.free_memory()  # module and optimiser are no part of the training that follows
    return result


def resume_command(config: PolicyConfig) -> str:
    return command("train_policy.py", "--output", config.output, "--resume")


def prepare_student(config: PolicyConfig, accelerator, student: Student) -> Callable[[], Any]:
    """Prepare model and optimiser. Returns a function that gives the model to generate with."""
    model = student.policy.model
    if config.gradient_checkpointing:
        weights.checkpoint_layers(model)
    dtype = build.compute_dtype(config)
    writer = weights.make_writer(model, dtype, accelerator.device, accelerator.is_fsdp2)
    packed = flash.takes_packed(model)
    learned = weights.learned_weights(model)
    optimizer = torch.optim.AdamW(learned, config.warm_start_lr, weight_decay=0.0)
    student.module, student.optimizer = accelerator.prepare(
        sft.Supervised(model, packed=packed), optimizer
    )
    return writer


def warm_start_schedule(config: PolicyConfig) -> supervised.Schedule:
    return supervised.Schedule(
        steps=config.warm_start_steps,
        batch_tokens=config.warm_start_tokens,
        lr=config.warm_start_lr,
        warmup=config.warmup,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        save_every=config.save_every,
        keep=config.keep,
    )


# ---- Demonstrations ------------------------------------------------------------------------------


def load_demonstrations(
    config: PolicyConfig,
    accelerator,
    student: Student,
    engine,
    examples: Sequence[Example],
    folder: Path,
) -> list[Trajectory]:
    """The demonstrations of the source that the settings name, with their tokens. They are written
    to `folder`/demonstrations.jsonl once, and read from there ever after."""
    path = folder / "demonstrations.jsonl"
    go_on = resume_command(config)
    if not path.is_file():
        try:
            trajectories = make_demonstrations(
                config, accelerator, student, engine, examples, folder
            )
        except ServiceError as error:
            raise UserError(f"{error} What was played is saved. Go on with: {go_on}") from error
        if accelerator.is_main_process:
            demonstrations = select(trajectories, student.policy, config.warm_start_reward)
            partial_path = path.with_suffix(".partial")
            run_folder.write_lines(partial_path, [asdict(row) for row in demonstrations], "w")
            partial_path.replace(path)
    accelerator.wait_for_everyone()
    return [from_row(row) for row in run_folder.read_lines(path)]


def make_demonstrations(
    config: PolicyConfig,
    accelerator,
    student: Student,
    engine,
    examples: Sequence[Example],
    folder: Path,
) -> list[Trajectory] | None:
    """Trajectories of the source, good and bad ones; None but on the main process. With an engine
    they are played by all processes, and what was played before a kill is not played again."""
    if config.warm_start not in (SCRIPTED, OWN):
        return read_demonstrations(Path(config.warm_start))
    questions = list(examples[: config.warm_start_questions])
    if config.warm_start == SCRIPTED:
        play = partial(search_plainly, max_searches=config.max_turns - 1, seed=config.seed)
    else:
        model = student.policy.model.to(accelerator.device)
        policy = replace(student.policy, model=model, temperature=config.temperature)
        play = partial(rollout, policy)
        questions = questions * config.group_size  # several tries at each
    # As noisy as what the policy will meet on the whole.
    noise = mean_noise(config.steps, config.noise_start, config.noise_end, config.noise_base)
    return answer_all(
        partial(play, engine=engine, noise=noise), questions, accelerator, log=folder / "played"
    )


def tokens_of(trajectory: Trajectory) -> sft.Tokens:
    return trajectory.ids, trajectory.loss_mask


# ---- What the warm start has changed -------------------------------------------------------------


def measure(
    accelerator,
    student: Student,
    writer: Callable[[], Any],
    engine,
    held_out: Sequence[Trajectory],
    config: PolicyConfig,
) -> dict[str, float]:
    """On held-out demonstrations: the loss of a token, and the share of valid actions and the F1 of
    the policy's own greedy answers to up to `PLAYED` of their questions."""
    texts = [tokens_of(trajectory) for trajectory in held_out]
    figures = {"loss": sft.mean_loss(accelerator, student.module, texts, config.warm_start_tokens)}
    policy = replace(student.policy, model=writer())
    questions = list(dict.fromkeys(trajectory.example for trajectory in held_out))[:PLAYED]
    rows = answer_all(partial(rollout, policy, engine=engine), questions, accelerator)
    if rows is not None:
        turns = [turn for row in rows for turn in row.turns]
        figures["valid_rate"] = fmean(turn.action != "invalid" for turn in turns)
        scores = summary(rows)
        for name in ("f1", "f1_stderr", "searches_per_question", "n"):
            figures[name] = scores[name]
    return figures


def describe(report: dict[str, dict], learned: int, held_out: int) -> str:
    """What the warm start has brought, in words."""
    before = report["before"]
    after = report["after"]
    return (
        f"The warm start has learned from {learned} demonstrations. On {held_out} held-out ones "
        f"the loss went from {before['loss']:.3f} to {after['loss']:.3f}; of its actions "
        f"{before['valid_rate']:.0%} were valid before and {after['valid_rate']:.0%} are now; "
        f"F1 went from {before['f1']:.1%} to {after['f1']:.1%} (n = {after['n']})."
    )


def load_report(folder: Path) -> dict[str, dict]:
    path = folder / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save_report(accelerator, folder: Path, report: dict[str, dict]) -> None:
    if accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def save_student(
    config: PolicyConfig,
    accelerator,
    student: Student,
    writer: Callable[[], Any],
    folder: Path,
) -> None:
    """Write `folder`/policy, a whole model: a LoRA is merged into it."""
    model = writer()
    if accelerator.is_main_process:
        tokenizer = student.policy.tokenizer
        if config.lora_rank:
            lora.save_lora(model, folder / "adapter")
            model = build.merged_model(config, config.policy, folder / "adapter")
        loading.save_model(model, tokenizer, folder / "policy", prompt=student.policy.template)
        run_folder.remove(folder / "checkpoints")
    accelerator.wait_for_everyone()
