"""Frozen embeddings and LoRA: what a training step of a model with a large vocabulary takes.

    python benchmarks/embeddings.py --model runs/real/gemma3_270m.gguf [--tokens 1000] [--repeats 2]

A step is forward, backward and AdamW on four rows of random tokens, half of them in the loss, in
bfloat16 over float32 weights, as `train_sim.py` and a warm start take it on a CPU. Seconds are
those of the processor, so that other work on the machine does not count. The peak is the resident
size above that of a process with PyTorch in it: weights, gradients, optimiser and activations. The
ways are measured one after another, each in a process of its own. The head runs on some tokens at a
time, but for the way that says so.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from minizs import logprobs, sft
from minizs.models import loading, lora, weights

ROWS, RANK = 4, 16
AT_ONCE = "frozen embeddings, all logits at once"
WAYS = ("all weights", "frozen embeddings", AT_ONCE, f"LoRA of rank {RANK}")


def make(way: str, name: str, tokens: int) -> Callable[[int], float]:
    """A function that loads the model when it is first called, and then takes a step."""
    things: dict = {}

    def load() -> None:
        is_lora = way.startswith("LoRA")
        model, _ = loading.load_model(name, dtype=torch.bfloat16 if is_lora else torch.float32)
        if is_lora:
            lora.add_lora(model, RANK)
        if way == AT_ONCE:
            logprobs.LOGITS = {"cpu": 2**62}
        if way.startswith("frozen embeddings"):
            weights.freeze_embeddings(model, torch.bfloat16)
        things["model"] = model
        things["optimizer"] = torch.optim.AdamW(weights.learned_weights(model), 1e-6)

    def step() -> None:
        model = things["model"]
        ids = torch.randint(3, 10_000, (ROWS, tokens // ROWS))
        mask = (torch.arange(tokens // ROWS) % 2).expand_as(ids)
        with torch.autocast("cpu", torch.bfloat16):
            loss, count = sft.nll(model, ids, torch.ones_like(ids), mask)
        (loss / count).backward()
        things["optimizer"].step()
        things["optimizer"].zero_grad()

    def work(number: int) -> float:
        if not things:
            load()
        start = process_time()
        step()
        return process_time() - start

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder, a hub name or a GGUF file")
    parser.add_argument("--tokens", type=int, default=1000, help="positions in a step")
    parser.add_argument("--threads", type=int, default=measure.cores(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=2, help="steps of each way, after the first")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="what is measured")
    options = parser.parse_args()
    print(measure.machine(options.threads))
    print("| what learns | CPU seconds a step | peak, GB |")
    print("|---|---|---|")
    for way in options.ways:
        side = measure.Side(make, way, options.model, options.tokens, threads=options.threads)
        with measure.together({way: side}):
            runs = measure.take_turns({way: side}, options.repeats)[way]
        seconds = median(run.value for run in runs)
        print(f"| {way} | {seconds:.1f} | {measure.peak(runs) / 1000:.1f} |", flush=True)


if __name__ == "__main__":
    main()
