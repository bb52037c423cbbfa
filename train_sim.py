"""Stage 1: fine-tune a language model into a search engine that writes useful or noisy documents.

    accelerate launch train_sim.py                      # the tiny world's, in runs/simulator
    python train_sim.py --collect                       # only what a real engine returned
    accelerate launch train_sim.py --data runs/collected/collected.jsonl --output runs/mine
    python train_sim.py --collect --data nq --engine http --engine_url URL --policy MODEL

Collect: searchers put queries to a real engine, and a judge labels each reply useful or noisy.
Train: the prompt holds query, question, gold answer and label; the loss is on the documents alone.
Report: on worlds that it has not seen, how often useful documents contain the answer, and noisy
ones do not. One world would not do: a model learns its facts by heart and ignores the prompt.

A simulator grows in OUTPUT.partial, which is renamed when it is whole. After a kill the same
command goes on from the newest checkpoint there, to the same weights.
"""

import json
import random
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path

from minizs import runs
from minizs.config import check_ranges, option, parse, require, run_script, save, set_threads
from minizs.options import ENGINES, SearchConfig, check_search

DEFAULT = str(runs.RUNS / "simulator")
FREE = {"output", "overwrite", "resume", "threads", "save_every", "keep", "report_queries"}


@dataclass
class SimConfig(SearchConfig):
    base: str = option("tiny", "The model to start from: 'tiny' (shipped), a folder or a hub name.")
    data: str = option("world", "'world', or pairs to learn from: what --collect wrote, "
                       "instruction and output, or messages. With --collect: questions.")
    collect: bool = option(False, "Only collect examples, into OUTPUT/collected.jsonl.")
    engine: str = option("bm25", "With --collect: what answers the policy.", ENGINES[:-1])
    output: str = option("", "Empty: runs/simulator, or runs/collected with --collect.")
    resume: str = option("", "Go on from the newest checkpoint, or the one named, with its run's "
                         "settings.", bare="latest")  # fmt: skip
    worlds: int = option(200, "Re-drawn worlds to collect from.")
    examples: int = option(12_000, "Examples to collect, useful and noisy in equal number.")
    steps: int = option(400, "Optimiser steps.")
    batch_tokens: int = option(3000, "Positions a step, over all processes, padding counted.")
    lr: float = option(4e-3, "Peak learning rate (AdamW); linear warm-up, then linear decay to 0.")
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    save_every: int = option(100, "Steps between checkpoints, in OUTPUT.partial; 0: none.")
    keep: int = option(2, "Checkpoints kept until the simulator is whole.")
    report_queries: int = option(500, "Queries of each kind for the report; 0: none.")


def check(config: SimConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    from minizs import checkpoint, models

    check_ranges(config, "worlds steps batch_tokens lr max_grad_norm temperature keep",
                 "report_queries save_every", share="warmup")  # fmt: skip
    require(config.examples > 1, "--examples must be 2 or more, one of each kind.")
    require(not config.collect or config.data != "world" or config.engine == "bm25", "--collect "
            f"asks BM25 in the tiny world; --engine {config.engine} needs --data.")  # fmt: skip
    models.check_model(config.base)
    require(not Path(config.base, "adapter_config.json").is_file(), f"{config.base} is a LoRA, "
            "which cannot be trained further; make it with --merge.")  # fmt: skip
    check_search(config if config.collect else replace(config, engine="none"))
    runs.check_free(Path(config.output), resume=False, overwrite=config.overwrite)
    runs.check_free(growing(config), resume=True, overwrite=False)
    if config.resume not in ("", "latest"):
        checkpoint.find(config.resume, growing(config) / "checkpoints")


def growing(config: SimConfig) -> Path:
    """The folder of a simulator that is not whole yet."""
    return Path(f"{Path(config.output)}.partial")


def collect(config: SimConfig) -> None:
    """Write OUTPUT/collected.jsonl: the tiny world's, or what a policy finds for its questions."""
    from minizs import collect, data, models, stages

    if config.data == "world":
        rows = collect.collect(config.worlds, config.examples, config.seed, config.top_k)
    else:
        accelerator = stages.make_accelerator(config)
        require(accelerator.num_processes == 1, "--collect has one process; start it with python.")
        examples = data.load(config.data, "train", accelerator.print)
        stages.check_prompts(config, config.policy, examples)
        engine = stages.build_engine(config, "train", accelerator)
        policy = stages.load(config, config.policy, models.device(), stages.compute_dtype(config))
        play = stages.searcher(config, *policy, models.load_prompt(config.policy), engine,
                               config.temperature, seed=config.seed,
                               noise=config.engine_noise)  # fmt: skip
        rows = collect.collect_with_policy(play, examples, config.examples)
    folder = runs.RunFolder(Path(config.output), config.overwrite).folder
    path = folder / "collected.jsonl"
    with open(path, "w", buffering=1) as file:  # each line at once: it may have been paid for
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{len(runs.read_lines(path))} examples are in {path}")


def go_on(config: SimConfig, accelerator, folder: Path) -> int:
    """Restore what a killed run of these settings left in the folder: its last step, 0 for none.
    Raises UserError for other settings, but for the default ones, which stage 2 counts on."""
    from minizs import checkpoint
    from minizs.config import UserError

    done, resume = 0, config.resume or ("" if config.overwrite else "latest")
    found = checkpoint.find(resume, folder / "checkpoints") if resume else None
    with suppress(UserError) if config == SimConfig(output=DEFAULT) else nullcontext():
        if found:
            runs.check_unchanged(folder, config, FREE)
            done = checkpoint.load(accelerator, found)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"Going on from step {done} of {folder}." if done else f"A new run in {folder}.")
        runs.RunFolder(folder).cut(done)
        checkpoint.cut(folder / "checkpoints", done)
        if not done:
            save(config, folder / "config.yaml")
    accelerator.wait_for_everyone()
    return done


def train(config: SimConfig, accelerator, model, optimizer, texts, folder: Path, done: int) -> None:
    """Supervised steps on encoded texts, after those that are `done`. Raises SystemExit by signal.
    The order of the texts is a function of the seed: a resumed run passes over what it has seen."""
    from tqdm import tqdm

    from minizs import checkpoint, sft

    rng, log = random.Random(f"order {config.seed}"), runs.RunFolder(folder)
    processes, rank = accelerator.num_processes, accelerator.process_index
    epochs = (sft.batches(rng.sample(texts, len(texts)), config.batch_tokens, rng) for _ in count())
    batches = islice(chain.from_iterable(epochs), done, config.steps)
    steps = tqdm(batches, initial=done, total=config.steps, disable=rank > 0, dynamic_ncols=True)
    with checkpoint.stopping() as asked:
        for step, rows in enumerate(steps, done + 1):
            mine = rows[rank::processes] or rows[:1]
            ids, attention, mask = sft.collate(mine, accelerator.device)
            if len(rows) <= rank:  # nothing left for this process, but it has to take part
                mask.zero_()
            rise = step / max(1, round(config.warmup * config.steps))
            fall = (config.steps - step + 1) / config.steps
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, rise, fall)
            loss, tokens = model(ids, attention, mask)
            total = accelerator.reduce(tokens, "sum")
            accelerator.backward(loss / total * processes)
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            mean = (accelerator.reduce(loss.detach(), "sum") / total).item()
            steps.set_postfix(loss=f"{mean:.3f}")
            if rank == 0:
                log.write_metrics({"step": step, "loss": mean})
            stop = asked(accelerator)
            if stop or config.save_every and step % config.save_every == 0:
                checkpoint.save(accelerator, folder / "checkpoints", step, config.keep)
            if stop:
                raise SystemExit(rank or f"Stopped after step {step}, which is saved. Go on with: "
                                 f"train_sim.py --output {config.output} --resume")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    config = parse(SimConfig, argv)
    config.output = config.output or (str(runs.RUNS / "collected") if config.collect else DEFAULT)
    if config.resume:  # with the run's own settings, where the flags are silent
        flags = [*runs.own_settings(growing(config)), *argv, "--output", config.output]
        config = parse(SimConfig, flags)
    whole = Path(config.output, "simulator_prompt.txt")  # what `models.save` writes last
    again = config.resume or config == SimConfig(output=DEFAULT)
    if again and whole.is_file() and not config.overwrite:
        from minizs import models

        models.check_model(config.output)
        return print(f"The simulator is in {config.output} already; --overwrite makes it anew.")
    check(config)
    set_threads(config.threads)
    if config.collect:
        return collect(config)
    import torch
    from filelock import FileLock

    from minizs import collect as collecting
    from minizs import data, models, sft, simulator, stages
    from minizs.cache import row_limit
    from minizs.replica import Writer

    accelerator = stages.make_accelerator(config)
    torch.manual_seed(config.seed)
    model, tokenizer = stages.load(config, config.base, torch.device("cpu"), torch.float32)
    template = simulator.load_template(config.simulator_template or models.resolve(config.base))
    require("{quality}" in template, "The prompt's wording lacks {quality}, the word that decides "
            "what a simulator writes; put it into --simulator_template.")  # fmt: skip
    if config.data == "world":
        rows = collecting.collect(config.worlds, config.examples, config.seed, config.top_k)
    else:
        rows = [row for part in data.check(config.data) for row in data.rows(part)]
    texts = collecting.pairs(rows, template, config.seed, accelerator.print)
    encoded = [sft.encode(tokenizer, text, end=True) for text in texts]
    limit = row_limit(model)
    fitting = [text for text in encoded if len(text[0]) <= limit]
    require(bool(fitting), f"All pairs of {config.data} have more than {limit} tokens.")
    accelerator.print(f"{len(fitting)} of {len(encoded)} have at most {limit} tokens.")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    packed = model.config._attn_implementation == "flash_attention_2"
    writer = Writer(model, stages.compute_dtype(config), accelerator.device, accelerator.is_fsdp2)
    prepared, optimizer = accelerator.prepare(sft.Supervised(model, packed=packed), optimizer)
    folder = growing(config)
    # One run at a time makes this simulator: the next waits, and uses what is there.
    with FileLock(folder.with_suffix(".lock")) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        if whole.is_file() and not config.overwrite:
            return accelerator.print(f"Another run has made {config.output} meanwhile.")
        done = go_on(config, accelerator, folder)
        train(config, accelerator, prepared, optimizer, fitting, folder, done)
        final = writer()
        if accelerator.is_main_process:
            finish(config, folder, final.eval(), tokenizer, template)
        accelerator.wait_for_everyone()


def finish(config: SimConfig, folder: Path, model, tokenizer, template: str) -> None:
    """Save the simulator, whole or not at all, and report on worlds that it has not seen."""
    from minizs import collect, models, simulator

    output = Path(config.output)
    models.save(model, tokenizer, folder, simulator_prompt=template)
    if config.overwrite:
        runs.remove(output)
    folder.rename(output)  # in one step; it stays where it is if something has come in between
    runs.remove(output / "checkpoints")
    print(f"The simulator is in {config.output}")
    if config.data == "world" and config.report_queries:
        engine = simulator.SimulatedSearch(model, tokenizer, template, config.top_k, config.seed,
                                           max_new_tokens=80)  # fmt: skip
        report = collect.report(engine, config.report_queries, config.seed)
        (output / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_script(main)
