"""Stage 1: fine-tune a language model into a search engine that writes useful or noisy documents.

    accelerate launch train_sim.py                      # the tiny world's, in runs/simulator
    python train_sim.py --collect --output runs/pages   # only collect what a real engine returned
    accelerate launch train_sim.py --data runs/pages/collected.jsonl

Collect: scripted searchers put queries to BM25 over many re-drawn worlds, and a judge labels each
reply useful or noisy for its query and question. Train: the prompt holds query, question, gold
answer and that label; the loss is on the documents alone; useful and noisy are balanced. Report: on
worlds that it has not seen, how often useful documents contain the answer, and noisy ones do not.

One world would not do: a model trained on it learns its facts by heart and ignores the prompt. And
a reply to the first query of a two-hop question names a bridge that the model invents, since only
the final answer is in the prompt; that is meant so (in paper section 3.3, too).
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from minizs.config import option, parse, require, run_script, save, set_threads


@dataclass
class SimConfig:
    base: str = option("tiny", "The model to start from: 'tiny' (shipped), a folder or a hub name.")
    data: str = option(
        "world", "'world', or a .jsonl of query, question, answers, documents, label."
    )
    collect: bool = option(
        False, "Only collect examples, into collected.jsonl in the output folder."
    )
    output: str = option("runs/simulator", "The simulator's folder.")
    overwrite: bool = option(False, "Delete what the output folder holds.")
    worlds: int = option(200, "Re-drawn worlds to collect from.")
    examples: int = option(12_000, "Examples to collect, useful and noisy in equal number.")
    steps: int = option(400, "Optimiser steps.")
    batch_tokens: int = option(4096, "Positions a step, over all processes, padding counted.")
    lr: float = option(2e-3, "Peak learning rate (AdamW); linear warm-up, then linear decay to 0.")
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    seed: int = option(0, "Decides the worlds, the order of examples and the report's samples.")
    top_k: int = option(3, "Documents a reply.")
    template: str = option(
        "", "A file with the prompt's wording; empty: the base model's own or the paper's."
    )
    report_queries: int = option(500, "Queries of each kind for the report; 0: none.")
    threads: int = option(0, "CPU threads a process; 0: all cores, shared by the processes.")


def check(config: SimConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    from minizs import models, runs

    for name in ("worlds", "steps", "batch_tokens", "lr", "max_grad_norm", "top_k"):
        require(getattr(config, name) > 0, f"--{name} must be greater than 0.")
    for name in ("report_queries", "threads"):
        require(getattr(config, name) >= 0, f"--{name} must be 0 or more.")
    require(config.examples > 1, "--examples must be 2 or more, one of each kind.")
    require(0 <= config.warmup <= 1, "--warmup is a share: give a number from 0 to 1.")
    for path in (config.data if config.data != "world" else "", config.template):
        require(not path or Path(path).is_file(), f"There is no file {path!r}; check the path.")
    models.check_model(config.base)
    runs.check_free(Path(config.output), resume=False, overwrite=config.overwrite)


def read_rows(path: str) -> list[dict]:
    """Collected examples of a file. Raises UserError for a line that is not one."""
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            fine = {"query", "question", "answers", "documents", "label"} <= row.keys()
            fine = fine and row["label"] in ("useful", "noisy")
            fine = fine and all(isinstance(row[key], list) for key in ("answers", "documents"))
        except (ValueError, AttributeError, TypeError):
            fine = False
        require(fine, f"Line {number} of {path} is no JSON object with query, question, lists "
                "of answers and documents, and a label that is 'useful' or 'noisy'.")  # fmt: skip
        rows.append(row)
    require(bool(rows), f"{path} is empty.")
    return rows


def train(config: SimConfig, accelerator, model, optimizer, texts) -> float:
    """Supervised steps on encoded texts; returns the last batches' mean loss."""
    from tqdm import tqdm

    from minizs import sft

    rng = random.Random(f"order {config.seed}")
    processes, rank = accelerator.num_processes, accelerator.process_index

    def forever():
        while True:
            yield from sft.batches(rng.sample(texts, len(texts)), config.batch_tokens, rng)

    stream, losses = forever(), []
    steps = tqdm(
        range(1, config.steps + 1), disable=not accelerator.is_main_process, dynamic_ncols=True
    )
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
    check(config)
    set_threads(config.threads)
    from minizs import collect, models, runs, sft, simulator

    output = Path(config.output)
    rows = read_rows(config.data) if config.data != "world" else None
    if config.collect:
        runs.RunFolder(output, config.overwrite)
        rows = collect.collect(config.worlds, config.examples, config.seed, config.top_k)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (output / "collected.jsonl").write_text(lines)
        print(f"{len(rows)} examples are in {output / 'collected.jsonl'}")
        return
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    torch.manual_seed(config.seed)
    model, tokenizer = models.load(config.base, accelerator.device)
    template = simulator.load_template(models.resolve(config.base))
    template = Path(config.template).read_text() if config.template else template
    if rows is None:
        rows = collect.collect(config.worlds, config.examples, config.seed, config.top_k)
    texts = [
        simulator.training_text(template, collect.request_of(row), row["documents"]) for row in rows
    ]
    encoded = [sft.encode(tokenizer, text, end=True) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    prepared, optimizer = accelerator.prepare(sft.Supervised(model), optimizer)
    train(config, accelerator, prepared, optimizer, encoded)
    if accelerator.is_main_process:
        finish(config, model.eval(), tokenizer, template)
    accelerator.wait_for_everyone()


def finish(config: SimConfig, model, tokenizer, template: str) -> None:
    """Save the simulator, whole or not at all, and report on worlds that it has not seen."""
    from minizs import collect, models, runs
    from minizs.simulator import SimulatedSearch

    output = Path(config.output)
    partial = output.with_name(output.name + ".partial")
    runs.RunFolder(partial, overwrite=True)
    save(config, partial / "settings.yaml")
    models.save(model, tokenizer, partial, simulator_prompt=template)
    if config.overwrite:
        runs.remove(output)
    partial.rename(output)
    print(f"The simulator is in {output}")
    if config.data == "world" and config.report_queries:
        engine = SimulatedSearch(model, tokenizer, template, config.top_k, config.seed, 1.0, 80)
        figures, shown = collect.report(engine, config.report_queries, config.seed)
        (output / "report.json").write_text(
            json.dumps({"figures": figures, "examples": shown}, indent=1)
        )
        print(collect.describe(figures, shown))


if __name__ == "__main__":
    run_script(main)
