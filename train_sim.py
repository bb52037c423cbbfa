"""Stage 1: fine-tune a language model into a search engine that writes useful or noisy documents.

    accelerate launch train_sim.py                      # the tiny world's, in runs/simulator
    python train_sim.py --collect --data nq --engine http --engine_url URL --policy MODEL

It learns to write what a real engine returned from query, question, gold answer and a judge's
word, useful or noisy. It grows in OUTPUT.partial, which is renamed when it is whole: after a kill
the same command goes on there, to the same weights (the default simulator begins anew)."""

import functools
import json
import random
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path

from minizs import require
from minizs.runs import run_folder
from minizs.runs.flags import may_change, option, parse, run_script, save_settings, set_threads
from minizs.runs.settings import REAL_ENGINES, SearchConfig, check_search, check_trainable

DEFAULT = str(run_folder.RUNS / "simulator")


@dataclass
class SimConfig(SearchConfig):
    """Stage 1: fine-tune a language model into a search engine that writes documents.

    Without any flag it trains the simulator of the tiny world, in runs/simulator.
    """

    base: str = option(
        "tiny",
        "The model to start from: a folder, a hub name, or 'tiny', the one that comes with minizs.",
        metavar="MODEL",
    )
    data: str = option(
        "world",
        "The pairs to learn from: 'world' collects them in the tiny world; otherwise files and hub "
        "names, with commas between them. With --collect: the questions to collect pairs for.",
    )
    output: str = option(
        "",
        "The simulator's folder. By default runs/simulator, or runs/collected with --collect.",
        metavar="PATH",
        may_change=True,
    )
    collect: bool = option(False, "Only collect pairs to learn from, into OUTPUT/collected.jsonl.")
    engine: str = option(
        "bm25",
        "With --collect and --data: the engine that answers the policy's searches.",
        REAL_ENGINES,
    )
    judge: str = option(
        "gold",
        "With --collect and --data: what tells useful documents from noisy ones. 'gold' looks for "
        "the answer in them; otherwise a model's folder, hub name or address.",
        metavar="MODEL",
    )
    worlds: int = option(200, "The number of re-drawn tiny worlds to collect pairs from.", min=1)
    examples: int = option(
        12_000, "The number of pairs to collect, useful and noisy in equal number.", min=2
    )
    steps: int = option(400, "The number of optimiser steps.", min=1)
    batch_tokens: int = option(
        3000, "The positions in a step, over all processes and with padding.", min=1
    )
    lr: float = option(
        4e-3, "The peak learning rate of AdamW. It rises linearly, then falls to 0.", above=0
    )
    warmup: float = option(
        0.05, "The share of the steps in which the learning rate rises.", min=0, max=1
    )
    max_grad_norm: float = option(
        1.0, "A gradient with a larger norm is scaled down to this one.", above=0
    )
    save_every: int = option(
        100,
        "The steps between two checkpoints, in OUTPUT.partial. 0 saves none.",
        min=0,
        may_change=True,
    )
    keep: int = option(
        2, "The number of checkpoints that are kept until the end.", min=1, may_change=True
    )
    resume: str = option(
        "",
        "Go on from the newest checkpoint, or from the one that is named.",
        bare="latest",
        metavar="CHECKPOINT",
        may_change=True,
    )
    report_queries: int = option(
        500,
        "The number of useful and of noisy queries for the simulator's report. 0 writes none.",
        min=0,
        may_change=True,
    )


def check(config: SimConfig, partial: Path) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    from minizs.models import loading
    from minizs.runs import checkpoint

    loading.check_model(config.base)
    require(
        config.judge == "gold" or config.collect and config.data != "world",
        f"--judge {config.judge} is for --collect with --data; leave it out.",
    )
    check_trainable(config.base)
    check_search(config if config.collect else replace(config, engine="none"))
    run_folder.check_free(Path(config.output), resume=False, overwrite=config.overwrite)
    if config.resume not in ("", "latest"):
        checkpoint.find(config.resume, partial)


def rows_of(config: SimConfig, accelerator):
    """The tiny world's rows, those in `--data`, or what a policy finds for the questions there."""
    from minizs import simulator
    from minizs.models import loading
    from minizs.rollout import rollout
    from minizs.runs import build, collect, data

    if config.data == "world":
        return collect.collect(config.worlds, config.examples, config.seed, config.top_k)
    if not config.collect:
        return [row for part in data.check_spec(config.data) for row in data.read_rows(part)]
    examples = data.load_examples(config.data, "train")
    build.check_lengths(config, [config.policy], examples)
    asked = replace(
        config,
        simulator=config.judge,
        simulator_template=simulator.JUDGE,
        top_k=0,
        simulator_temperature=0.0,
        max_document_tokens=8,
        on_search_error="stop",
    )
    judge = None if config.judge == "gold" else build.simulated(asked, accelerator, examples)
    engine = build.build_engine(config, "train", accelerator, examples)
    model, tokenizer = build.load(config, config.policy, loading.device())
    template = loading.load_prompt(config.policy)
    policy = build.make_policy(config, model, tokenizer, template, config.temperature)
    play = functools.partial(rollout, policy, engine=engine, noise=config.engine_noise)
    return collect.collect_with_policy(play, examples, config.examples, judge=judge)


def train(config: SimConfig, accelerator, model, optimizer, texts, partial: Path) -> None:
    """Supervised steps on encoded texts, after those of a killed run. Raises UserError if it had
    other settings (but --overwrite, and what stage 2 counts on, begin anew); SystemExit by signal.
    The order of the texts is a function of the seed: what was seen is passed over."""
    from tqdm import tqdm

    from minizs import sft
    from minizs.runs import checkpoint

    anew = not config.resume and (config.overwrite or config == SimConfig(output=DEFAULT))
    found = None if anew else checkpoint.find(config.resume or "latest", partial)
    if found:
        run_folder.check_unchanged(partial, config, may_change(config))
    done = checkpoint.load(accelerator, found) if found else 0
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"Going on from step {done} of {partial}." if found else f"A new run in {partial}.")
        run_folder.begin(partial, done)
        if not found:
            save_settings(config, partial / "config.yaml")
    processes, rank = accelerator.num_processes, accelerator.process_index
    rng = random.Random(f"order {config.seed}")
    epochs = (sft.batches(rng.sample(texts, len(texts)), config.batch_tokens, rng) for _ in count())
    batches = islice(chain.from_iterable(epochs), done, config.steps)
    steps = tqdm(batches, initial=done, total=config.steps, disable=rank > 0, dynamic_ncols=True)
    with checkpoint.stopping() as asked:
        for step, rows in enumerate(steps, done + 1):
            *inputs, mask = sft.collate(rows[rank::processes] or rows[:1], accelerator.device)
            if len(rows) <= rank:  # nothing left for this process, but it has to take part
                mask.zero_()
            rise = step / max(1, round(config.warmup * config.steps))
            fall = (config.steps - step + 1) / config.steps
            optimizer.param_groups[0]["lr"] = config.lr * min(1.0, rise, fall)
            loss, tokens = model(*inputs, mask)
            total = accelerator.reduce(tokens, "sum")
            accelerator.backward(loss / total * processes)
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            mean = (accelerator.reduce(loss.detach(), "sum") / total).item()
            steps.set_postfix(loss=f"{mean:.3f}")
            if rank == 0:
                run_folder.write_lines(partial / "metrics.jsonl", [{"step": step, "loss": mean}])
            stop = asked(accelerator)
            if stop or config.save_every and step % config.save_every == 0:
                checkpoint.save(accelerator, partial, step, config.keep)
            if stop:
                raise SystemExit(
                    rank
                    or f"Stopped after step {step}, which is saved. Go on with: "
                    f"train_sim.py --output {config.output} --resume"
                )


def main(argv: list[str]) -> None:
    config = parse(SimConfig, argv)
    config.output = config.output or (
        str(run_folder.RUNS / "collected") if config.collect else DEFAULT
    )
    output = Path(config.output)
    partial, whole = Path(f"{output}.partial"), output / "simulator_prompt.txt"  # written last
    if config.resume:  # with the run's own settings, where the flags are silent
        config = parse(SimConfig, [*argv, "--output", config.output], partial / "config.yaml")
    again = config.resume or config == SimConfig(output=DEFAULT)
    if again and whole.is_file() and not config.overwrite:
        return print(f"The simulator is in {output} already; --overwrite makes it anew.")
    check(config, partial)
    set_threads(config.threads)
    import torch
    from filelock import FileLock

    from minizs import sft, simulator
    from minizs.cache import row_limit
    from minizs.models import loading
    from minizs.runs import build, collect

    accelerator = build.make_accelerator(config)
    require(not config.collect or accelerator.num_processes == 1, "--collect: use one process.")
    rows = rows_of(config, accelerator)
    if config.collect:
        run_folder.begin(output, overwrite=config.overwrite)
        with open(output / "collected.jsonl", "w", buffering=1) as file:  # a line may be paid for
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return print(f"The examples are in {output}/collected.jsonl")
    model, tokenizer = build.load(config, config.base, torch.device("cpu"), torch.float32)
    template = simulator.load_template(config.simulator_template or loading.resolve(config.base))
    require("{quality}" in template, "The prompt lacks {quality}; put it in --simulator_template.")
    limit, pairs = row_limit(model), collect.pairs(rows, template, config.seed)
    texts = [sft.encode(tokenizer, pair, end=True) for pair in pairs]
    texts = [text for text in texts if len(text[0]) <= limit]
    require(bool(texts), f"All pairs of {config.data} have more than {limit} tokens.")
    accelerator.print(f"{len(pairs)} of {len(rows)} pairs are taken; {len(texts)} fit the model.")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    packed = model.config._attn_implementation == "flash_attention_2"
    dtype, sharded = build.compute_dtype(config), accelerator.is_fsdp2
    writer = loading.make_writer(model, dtype, accelerator.device, sharded)
    prepared, optimizer = accelerator.prepare(sft.Supervised(model, packed=packed), optimizer)
    # One run at a time makes this simulator: the next waits, and uses what is there.
    with FileLock(f"{output}.lock") if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        if whole.is_file() and not config.overwrite:
            return accelerator.print(f"Another run has made {output} meanwhile.")
        train(config, accelerator, prepared, optimizer, texts, partial)
        final = writer().eval()
        if accelerator.is_main_process:
            loading.save(final, tokenizer, partial, simulator_prompt=template)
            if config.overwrite:
                run_folder.remove(output)
            partial.rename(output)  # in one step; it stays if something has come in between
            run_folder.remove(output / "checkpoints")
            print(f"The simulator is in {output}")
            if config.data == "world" and config.report_queries:
                engine = simulator.SimulatedSearch(
                    final, tokenizer, template, config.top_k, config.seed, max_new_tokens=80
                )
                figures = collect.report(engine, config.report_queries, config.seed)
                (output / "report.json").write_text(json.dumps(figures, indent=1))
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_script(main)
