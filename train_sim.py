"""Stage 1: fine-tune a language model into a search engine that writes useful or noisy documents.

    accelerate launch train_sim.py                      # the tiny world's, in runs/simulator
    python train_sim.py --collect                       # only what a real engine returned
    accelerate launch train_sim.py --data runs/collected/collected.jsonl --output runs/mine
    python train_sim.py --collect --data nq --engine http --engine_url URL --policy MODEL

Collect: in the tiny world scripted searchers, with other data a policy, put queries to a real
engine, and a judge labels each reply useful or noisy for its query and question. Train: the prompt
holds query, question, gold answer and that label; the loss is on the documents alone; useful and
noisy are balanced. Report: on worlds that it has not seen, how often useful documents contain the
answer, and noisy ones do not.

One world would not do: a model trained on it learns its facts by heart and ignores the prompt. And
a reply to the first query of a two-hop question names a bridge that the model invents, since only
the final answer is in the prompt; that is meant so (in paper section 3.3, too).
"""

import json
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

from minizs import runs
from minizs.config import check_ranges, option, parse, require, run_script, save, set_threads
from minizs.options import ENGINES, SearchConfig, check_search

DEFAULT = str(runs.RUNS / "simulator")
PROMPT_FILE = "simulator_prompt.txt"  # what `models.save` writes last: the simulator is whole


@dataclass
class SimConfig(SearchConfig):
    base: str = option("tiny", "The model to start from: 'tiny' (shipped), a folder or a hub name.")
    data: str = option("world", "'world', or pairs to learn from: what --collect wrote, "
                       "instruction and output, or messages. With --collect: questions.")
    collect: bool = option(False, "Only collect examples, into OUTPUT/collected.jsonl.")
    engine: str = option("bm25", "With --collect: what answers the policy.", ENGINES[:-1])
    output: str = option("", "Empty: runs/simulator, or runs/collected with --collect.")
    worlds: int = option(200, "Re-drawn worlds to collect from.")
    examples: int = option(12_000, "Examples to collect, useful and noisy in equal number.")
    steps: int = option(400, "Optimiser steps.")
    batch_tokens: int = option(3000, "Positions a step, over all processes, padding counted.")
    lr: float = option(4e-3, "Peak learning rate (AdamW); linear warm-up, then linear decay to 0.")
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    template: str = option("", "A file with the prompt's wording; empty: the base's or paper's.")
    report_queries: int = option(500, "Queries of each kind for the report; 0: none.")


def check(config: SimConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    from minizs import models

    positive = "worlds steps batch_tokens lr max_grad_norm temperature"
    check_ranges(config, positive, "report_queries", share="warmup")
    require(config.examples > 1, "--examples must be 2 or more, one of each kind.")
    require(not config.template or Path(config.template).is_file(),
            f"There is no file {config.template!r}; check the path.")  # fmt: skip
    if config.template:
        text = Path(config.template).read_text()
        require("{query}" in text and "{quality}" in text, f"{config.template} lacks {{query}} or "
                "{quality}, without which the simulator is not told what to write.")  # fmt: skip
    require(not config.collect or config.data != "world" or config.engine == "bm25", "--collect "
            f"asks BM25 in the tiny world; --engine {config.engine} needs --data.")  # fmt: skip
    models.check_model(config.base)
    require(not Path(config.base, "adapter_config.json").is_file(), f"{config.base} is a LoRA, "
            "which cannot be trained further; make it with --merge.")  # fmt: skip
    check_search(config if config.collect else replace(config, engine="none"))
    runs.check_free(Path(config.output), resume=False, overwrite=config.overwrite)


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
        rows = collect.collect_with_policy(
            *policy, examples, engine, config.examples, config.seed, limits=stages.limits(config),
            template=models.load_prompt(config.policy), temperature=config.temperature,
            noise=config.engine_noise,
        )  # fmt: skip
    folder = runs.RunFolder(Path(config.output), config.overwrite).folder
    path = folder / "collected.jsonl"
    with open(path, "w", buffering=1) as file:  # each line at once: it may have been paid for
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{len(runs.read_lines(path))} examples are in {path}")


def train(config: SimConfig, accelerator, model, optimizer, texts) -> float:
    """Supervised steps on encoded texts; returns the mean loss of the last 20."""
    from tqdm import tqdm

    from minizs import sft

    rng = random.Random(f"order {config.seed}")
    processes, rank = accelerator.num_processes, accelerator.process_index

    def forever():
        while True:
            yield from sft.batches(rng.sample(texts, len(texts)), config.batch_tokens, rng)

    stream, losses = forever(), []
    steps = tqdm(range(1, config.steps + 1), disable=rank > 0, dynamic_ncols=True)
    for step in steps:
        rows = next(stream)
        mine = rows[rank::processes] or rows[:1]
        ids, attention, mask = sft.collate(mine, accelerator.device)
        if len(rows) <= rank:  # nothing left for this process, but it has to take part
            mask.zero_()
        for group in optimizer.param_groups:
            rise = step / max(1, round(config.warmup * config.steps))
            fall = (config.steps - step + 1) / config.steps
            group["lr"] = config.lr * min(1.0, rise, fall)
        loss, count = model(ids, attention, mask)
        total = accelerator.reduce(count, "sum")
        accelerator.backward(loss / total * processes)
        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses = losses[-19:] + [(accelerator.reduce(loss.detach(), "sum") / total).item()]
        steps.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
    return sum(losses) / len(losses)


def main(argv: list[str] | None = None) -> None:
    config = parse(SimConfig, argv)
    config.output = config.output or (str(runs.RUNS / "collected") if config.collect else DEFAULT)
    if config == SimConfig(output=DEFAULT) and Path(DEFAULT, PROMPT_FILE).is_file():
        from minizs import models

        models.check_model(DEFAULT)
        return print(f"The simulator is in {DEFAULT} already; --overwrite makes it anew.")
    check(config)
    set_threads(config.threads)
    if config.collect:
        return collect(config)
    import torch

    from minizs import collect as collecting
    from minizs import models, sft, simulator, stages
    from minizs.cache import row_limit
    from minizs.pairs import pairs
    from minizs.replica import Writer

    accelerator = stages.make_accelerator(config)
    torch.manual_seed(config.seed)
    model, tokenizer = stages.load(config, config.base, torch.device("cpu"), torch.float32)
    template = simulator.load_template(config.template or models.resolve(config.base))
    if config.data == "world":
        rows = collecting.collect(config.worlds, config.examples, config.seed, config.top_k)
        texts = [simulator.training_text(template, collecting.request_of(row), row["documents"])
                 for row in rows]  # fmt: skip
    else:
        texts = pairs(config.data, template, config.seed, accelerator.print)
    encoded = [sft.encode(tokenizer, text, end=True) for text in texts]
    limit = row_limit(model)
    fitting = [text for text in encoded if len(text[0]) <= limit]
    require(bool(fitting), f"All pairs of {config.data} have more than {limit} tokens.")
    if len(fitting) < len(encoded):
        print(f"{len(encoded) - len(fitting)} pairs of more than {limit} tokens are left out.")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    accelerator.print(f"Attention by {model.config._attn_implementation}.")
    packed = model.config._attn_implementation == "flash_attention_2"
    dtype = stages.compute_dtype(config)
    writer = Writer(model, dtype, accelerator.device, sharded=accelerator.is_fsdp2)
    prepared, optimizer = accelerator.prepare(sft.Supervised(model, packed), optimizer)
    train(config, accelerator, prepared, optimizer, fitting)
    final = writer()
    if accelerator.is_main_process:
        finish(config, final.eval(), tokenizer, template)
    accelerator.wait_for_everyone()


def finish(config: SimConfig, model, tokenizer, template: str) -> None:
    """Save the simulator, whole or not at all, and report on worlds that it has not seen.

    Of several processes that make it at once, the first to end wins: renaming is one step, and
    fails where the folder is there and holds something.
    """
    from minizs import collect, models, simulator

    output = Path(config.output).resolve()
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    runs.RunFolder(partial, overwrite=True)
    save(config, partial / "settings.yaml")
    models.save(model, tokenizer, partial, simulator_prompt=template)
    if config.overwrite:
        runs.remove(output)
    try:
        partial.rename(output)
    except OSError as error:
        theirs = (output / "config.json").is_file()
        require(theirs, f"The simulator stays in {partial}, since {output} is in use: {error}")
        runs.remove(partial)
        return print(f"Another process has made {config.output} meanwhile; it is used, not ours.")
    print(f"The simulator is in {config.output}")
    if config.data == "world" and config.report_queries:
        engine = simulator.SimulatedSearch(model, tokenizer, template, config.top_k, config.seed,
                                           max_new_tokens=80)  # fmt: skip
        figures, shown = collect.report(engine, config.report_queries, config.seed)
        report = {"figures": figures, "examples": shown}
        (output / "report.json").write_text(json.dumps(report, indent=1))
        print(collect.describe(figures, shown))


if __name__ == "__main__":
    run_script(main)
