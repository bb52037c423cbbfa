"""Stage 1: fine-tune a language model into a search engine that writes useful or noisy documents.

    accelerate launch train_sim.py                      # the tiny world's, in runs/simulator
    python train_sim.py --collect                       # only what a real engine returned
    accelerate launch train_sim.py --data runs/collected/collected.jsonl --output runs/mine

Collect: scripted searchers put queries to BM25 over many re-drawn worlds, and a judge labels each
reply useful or noisy for its query and question. Train: the prompt holds query, question, gold
answer and that label; the loss is on the documents alone; useful and noisy are balanced. Report: on
worlds that it has not seen, how often useful documents contain the answer, and noisy ones do not.

One world would not do: a model trained on it learns its facts by heart and ignores the prompt. And
a reply to the first query of a two-hop question names a bridge that the model invents, since only
the final answer is in the prompt; that is meant so (in paper section 3.3, too).
"""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from minizs import collect, models, runs, sft, simulator
from minizs.config import check_ranges, option, parse, require, run_script, save, set_threads

DEFAULT = str(runs.RUNS / "simulator")


@dataclass
class SimConfig:
    base: str = option("tiny", "The model to start from: 'tiny' (shipped), a folder or a hub name.")
    data: str = option("world", "'world', or a .jsonl as --collect writes it.")
    collect: bool = option(False, "Only collect examples, into OUTPUT/collected.jsonl.")
    output: str = option("", "Empty: runs/simulator, or runs/collected with --collect.")
    overwrite: bool = option(False, "Delete what the output folder holds.")
    worlds: int = option(200, "Re-drawn worlds to collect from.")
    examples: int = option(12_000, "Examples to collect, useful and noisy in equal number.")
    steps: int = option(400, "Optimiser steps.")
    batch_tokens: int = option(3000, "Positions a step, over all processes, padding counted.")
    lr: float = option(4e-3, "Peak learning rate (AdamW); linear warm-up, then linear decay to 0.")
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    seed: int = option(0, "Decides the worlds, the order of examples and the report's samples.")
    top_k: int = option(3, "Documents a reply.")
    template: str = option("", "A file with the prompt's wording; empty: the base's or paper's.")
    report_queries: int = option(500, "Queries of each kind for the report; 0: none.")
    threads: int = option(0, "CPU threads a process; 0: all cores, shared by the processes.")


def check(config: SimConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    positive = "worlds steps batch_tokens lr max_grad_norm top_k"
    check_ranges(config, positive, "report_queries threads", share="warmup")
    require(config.examples > 1, "--examples must be 2 or more, one of each kind.")
    require(not config.collect or config.data == "world",
            "--collect makes examples, --data FILE has them; give only one.")  # fmt: skip
    for path in (config.data if config.data != "world" else "", config.template):
        require(not path or Path(path).is_file(), f"There is no file {path!r}; check the path.")
    if config.template:
        text = Path(config.template).read_text()
        require("{query}" in text and "{quality}" in text, f"{config.template} lacks {{query}} or "
                "{quality}, without which the simulator is not told what to write.")  # fmt: skip
    models.check_model(config.base)
    runs.check_free(Path(config.output), resume=False, overwrite=config.overwrite)


def read_rows(path: str) -> list[dict]:
    """Collected examples of a file. Raises UserError for a line that is not one."""
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            fine = {"query", "question"} <= row.keys() and row["label"] in ("useful", "noisy")
            fine = fine and all(isinstance(row[key], list) for key in ("answers", "documents"))
        except (ValueError, AttributeError, TypeError, KeyError):
            fine = False
        require(fine, f"Line {number} of {path} is no JSON object with query, question, lists "
                "of answers and documents, and a label that is 'useful' or 'noisy'.")  # fmt: skip
        rows.append(row)
    require(bool(rows), f"{path} is empty.")
    return rows


def train(config: SimConfig, accelerator, model, optimizer, texts) -> float:
    """Supervised steps on encoded texts; returns the mean loss of the last 20."""
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
    if config == SimConfig(output=DEFAULT) and Path(DEFAULT, simulator.PROMPT_FILE).is_file():
        models.check_model(DEFAULT)
        return print(f"The simulator is in {DEFAULT} already; --overwrite makes it anew.")
    check(config)
    set_threads(config.threads)
    settings = config.worlds, config.examples, config.seed, config.top_k
    if config.collect:
        folder = runs.RunFolder(Path(config.output), config.overwrite).folder
        lines = [json.dumps(row) + "\n" for row in collect.collect(*settings)]
        (folder / "collected.jsonl").write_text("".join(lines))
        return print(f"{len(lines)} examples are in {folder / 'collected.jsonl'}")
    rows = read_rows(config.data) if config.data != "world" else None
    accelerator = Accelerator()
    torch.manual_seed(config.seed)
    model, tokenizer = models.load(config.base, accelerator.device)
    template = simulator.load_template(models.resolve(config.base))
    template = Path(config.template).read_text() if config.template else template
    rows = collect.collect(*settings) if rows is None else rows
    texts = [simulator.training_text(template, collect.request_of(row), row["documents"])
             for row in rows]  # fmt: skip
    encoded = [sft.encode(tokenizer, text, end=True) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    prepared, optimizer = accelerator.prepare(sft.Supervised(model), optimizer)
    train(config, accelerator, prepared, optimizer, encoded)
    if accelerator.is_main_process:
        finish(config, model.eval(), tokenizer, template)
    accelerator.wait_for_everyone()


def finish(config: SimConfig, model, tokenizer, template: str) -> None:
    """Save the simulator, whole or not at all, and report on worlds that it has not seen.

    Of several processes that make it at once, the first to end wins: renaming is one step, and
    fails where the folder is there and holds something.
    """
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
