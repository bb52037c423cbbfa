"""The parts of train_sim.py: rows, texts, the base model, and a folder that is whole or not there.

The results of a run lie in `OUTPUT.partial` until they are whole; then this folder is renamed to
`OUTPUT` in one step.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from minizs import UserError, require, sft, simulator
from minizs.engines.cache import Cached
from minizs.engines.client import ServiceError
from minizs.imitation import quality, supervised
from minizs.imitation.collect import Collection, collect_from_searches, collect_from_worlds
from minizs.imitation.pairs import make_pairs
from minizs.imitation.plain_searcher import search_plainly
from minizs.models import flash, loading, lora, weights
from minizs.models.support import row_limit
from minizs.rollout import Policy, rollout
from minizs.runs import build, checkpoint, data, run_folder
from minizs.runs.advice import command
from minizs.runs.flags import may_change, save_settings
from minizs.runs.settings import SimConfig, searches_with_policy
from minizs.trajectory import Example

REPORT_TOKENS = 80  # that the simulator may write for a reply of its report


@dataclass
class Base:
    """The model to start from, its tokenizer, and the wording of the simulator's prompt."""

    model: Any
    tokenizer: Any
    template: str


@contextmanager
def alone(accelerator, output: Path) -> Iterator[None]:
    """Inside, no other run makes the same output: the next one waits here."""
    path = output.with_name(f".{output.name}.lock")
    with FileLock(path) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        yield
        accelerator.wait_for_everyone()


def finish(config: SimConfig) -> Path:
    """Rename the partial folder to the output, in one step; what has come there meanwhile is left
    alone, and the results stay where they are. Returns the output."""
    output = Path(config.output)
    if config.overwrite:
        run_folder.remove(output)
    run_folder.move(run_folder.partial_folder(output), output)
    return output


# ---- Collecting ----------------------------------------------------------------------------------


@dataclass
class Sources:
    """What pairs are collected from: questions, an engine, and perhaps a policy and a judge."""

    examples: list[Example]
    engine: Any
    policy: Policy | None  # who searches; without one the plain searcher does
    judge: Any  # the model that labels rows; without one the gold answers do


def build_sources(config: SimConfig, accelerator) -> Sources:
    """All of these, before anything is written. Raises UserError."""
    examples = data.load_examples(config.data, "train")
    judge = None if config.judge == "gold" else build.build_judge(config, accelerator)
    engine = build.build_engine(config, "train", accelerator, examples)
    policy = None
    if searches_with_policy(config):
        build.check_lengths(config, [config.policy], examples)
        model, tokenizer = build.load_configured_model(config, config.policy, loading.device())
        template = loading.load_prompt(config.policy)
        policy = build.make_policy(config, model, tokenizer, template, config.temperature)
    return Sources(examples, engine, policy, judge)


def collect(config: SimConfig, sources: Sources | None) -> None:
    """Write OUTPUT/collected.jsonl. `sources` is None for the tiny world, which takes seconds and
    always begins anew. Elsewhere a collection that broke off asks no question twice."""
    if sources is None:
        collection = open_collection(config, begin_anew=True)
        rows = collect_from_worlds(config.worlds, config.examples, config.seed, config.top_k)
        collection.add(rows)
    else:
        collection = open_collection(config, begin_anew=config.overwrite)
        collect_from_sources(config, sources, collection)
    collection.finish()
    counts = ", ".join(f"{count} {label}" for label, count in collection.counts().items())
    print(f"The examples are in {finish(config) / 'collected.jsonl'}: {counts}.")


def open_collection(config: SimConfig, begin_anew: bool) -> Collection:
    """The collection in the partial folder, empty or as it broke off. Raises UserError if it was
    begun with other settings."""
    folder = run_folder.partial_folder(Path(config.output))
    if begin_anew:
        run_folder.remove(folder)
    run_folder.check_unchanged(folder, config, may_change(config))
    folder.mkdir(parents=True, exist_ok=True)
    save_settings(config, folder / "config.yaml")
    collection = Collection(folder)
    if collection.questions:
        print(
            f"Going on after {collection.questions} questions, which gave "
            f"{len(collection.rows)} examples."
        )
    return collection


def collect_from_sources(config: SimConfig, sources: Sources, collection: Collection) -> None:
    """Ask the questions of `--data`. Raises UserError where a service is gone and SystemExit on
    Ctrl-C; both say how to go on."""
    engine = sources.engine
    if config.engine in ("http", "web") and not config.cache:
        # A batch of questions that breaks off in its middle has been paid for, too.
        engine = Cached(engine, str(collection.file.with_name("replies.sqlite")), config.engine)
    play = build_searcher(config, sources.policy, engine)
    go_on = command("train_sim.py", "--output", config.output, "--resume")
    saved = f"What was collected is saved. Go on with: {go_on}"
    try:
        collect_from_searches(play, sources.examples, config.examples, collection, sources.judge)
    except ServiceError as error:
        raise UserError(f"{error} {saved}") from error
    except KeyboardInterrupt as interrupt:
        raise SystemExit(f"Stopped. {saved}") from interrupt


def build_searcher(config: SimConfig, policy: Policy | None, engine) -> Callable:
    """Who searches: a function of examples and their keys that returns trajectories."""
    if policy is not None:
        return partial(rollout, policy, engine=engine, noise=config.engine_noise)
    return partial(
        search_plainly,
        engine=engine,
        max_searches=config.max_turns - 1,
        noise=config.engine_noise,
        seed=config.seed,
    )


# ---- Fine-tuning ---------------------------------------------------------------------------------


def load_rows(config: SimConfig) -> list[dict]:
    """The rows to learn from: the tiny world's, which are collected here and now, or those of the
    files and hub names in `--data`."""
    if config.data == "world":
        return collect_from_worlds(config.worlds, config.examples, config.seed, config.top_k)
    return [row for part in data.check_spec(config.data) for row in data.part_rows(part)]


def load_base(config: SimConfig, accelerator) -> Base:
    """The model to start from, on the CPU, with its LoRA if it has one; what learns is float32.
    Raises UserError for a prompt that does not tell useful from noisy."""
    dtype = build.compute_dtype(config) if config.lora_rank else torch.float32
    model, tokenizer = build.load_configured_model(config, config.base, torch.device("cpu"), dtype)
    if config.freeze_embeddings:
        weights.freeze_embeddings(model, build.frozen_dtype(config, accelerator, model))
    if config.lora_rank:
        lora.add_lora(model, config.lora_rank, config.seed)
    own_template = loading.resolve(config.base)
    template = simulator.load_template(config.simulator_template or own_template)
    require("{quality}" in template, "The prompt lacks {quality}; put it in --simulator_template.")
    return Base(model, tokenizer, template)


def encode_rows(config: SimConfig, accelerator, rows: list[dict], base: Base) -> list[sft.Tokens]:
    """The training texts of the rows, as many useful as noisy, without those that are too long for
    the model. Raises UserError if none is left."""
    texts = make_pairs(rows, base.template, config.seed)
    encoded = [sft.encode(base.tokenizer, text, end=True) for text in texts]
    limit = row_limit(base.model)
    fitting = [(ids, mask) for ids, mask in encoded if len(ids) <= limit]
    require(bool(fitting), f"All pairs of {config.data} have more than {limit} tokens.")
    accelerator.print(f"{len(texts)} of {len(rows)} pairs are taken; {len(fitting)} fit the model.")
    return fitting


def fine_tune(
    config: SimConfig, accelerator, base: Base, texts: list[sft.Tokens], begin_anew: bool
) -> Any:
    """Train the base model in the partial folder, after the steps of a run that broke off unless
    `begin_anew`. Returns the trained model, to be saved and used. Raises UserError if that run had
    other settings."""
    if config.gradient_checkpointing:
        weights.checkpoint_layers(base.model)
    learned = weights.learned_weights(base.model)
    optimizer = torch.optim.AdamW(learned, lr=config.lr, weight_decay=0.0)
    packed = flash.takes_packed(base.model)
    dtype = build.compute_dtype(config)
    writer = weights.make_writer(base.model, dtype, accelerator.device, accelerator.is_fsdp2)
    model, optimizer = accelerator.prepare(sft.Supervised(base.model, packed=packed), optimizer)
    folder = run_folder.partial_folder(Path(config.output))
    saved = None if begin_anew else checkpoint.find_checkpoint(config.resume or "latest", folder)
    if saved:
        run_folder.check_unchanged(folder, config, may_change(config))
    last_step = supervised.start_or_resume(accelerator, folder, config, saved)
    go_on = command("train_sim.py", "--output", config.output, "--resume")
    schedule = fine_tuning_schedule(config)
    supervised.train(schedule, accelerator, model, optimizer, texts, folder, last_step, go_on)
    return writer().eval()


def fine_tuning_schedule(config: SimConfig) -> supervised.Schedule:
    return supervised.Schedule(
        steps=config.steps,
        batch_tokens=config.batch_tokens,
        lr=config.lr,
        warmup=config.warmup,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        save_every=config.save_every,
        keep=config.keep,
    )


def save_simulator(config: SimConfig, model, base: Base) -> Path:
    """Write the model folder with its prompt, and let it take its place; a LoRA is merged into the
    model. Returns the output."""
    folder = run_folder.partial_folder(Path(config.output))
    if config.lora_rank:
        lora.save_lora(model, folder / "adapter")
        model = build.merged_model(config, config.base, folder / "adapter")
    loading.save_model(model, base.tokenizer, folder, simulator_prompt=base.template)
    output = finish(config)
    run_folder.remove(output / "checkpoints")
    print(f"The simulator is in {output}")
    return output


def write_report(config: SimConfig, model, base: Base) -> None:
    """How often the simulator does what it is told, as a table and in OUTPUT/report.json."""
    engine = simulator.SimulatedSearch(
        model,
        base.tokenizer,
        base.template,
        config.top_k,
        config.seed,
        config.simulator_temperature,
        max_new_tokens=REPORT_TOKENS,
        cuda_graphs=config.cuda_graphs,
        contrast=config.simulator_contrast,
    )
    figures = quality.measure_quality(engine, config.report_queries, config.seed)
    (Path(config.output) / "report.json").write_text(
        json.dumps(figures, indent=1), encoding="utf-8"
    )
