"""bfloat16 beside float32 on this CPU: what `--dtype auto` should choose, and from which width on.

    python benchmarks/formats.py [--models tiny 256 512 768] [--threads 1] [--repeats 3]

Each model is tried with two kinds of work: 16 rows of 150 tokens are continued by 16 tokens each,
and 16 rows of 128 tokens are scored and differentiated, half of their tokens in the loss. The
sides take turns. Generation has its weights in the format; an update has float32 weights and
computes in bfloat16 under autocast, as training does. A number is the width of a random model of
six layers with 8,000 ids.

Seconds are those of the processor, so that other work on the machine does not count. With one
thread they are also the time that one waits.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import process_time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from minizs.generate import generate
from minizs.logprobs import score
from minizs.models import loading, weights

ROWS, PROMPT, NEW, LENGTH = 16, 150, 16, 128
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_model(name: str):
    """A random model of this width, or the one that `loading.load_model` knows; in float32."""
    if not name.isdigit():
        return loading.load_model(name)[0]
    width = int(name)
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=width,
        num_hidden_layers=6,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        intermediate_size=3 * width,
        vocab_size=8000,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


def random_ids(length: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab, (ROWS, length), generator=generator)


def generation(name: str, number_format: str) -> Callable[[int], float]:
    model = weights.cast_weights(make_model(name), FORMATS[number_format])
    prompts = random_ids(PROMPT, model.config.vocab_size).tolist()

    def work(number: int) -> float:
        start = process_time()
        generate(model, prompts, NEW, eos_id=())
        return process_time() - start

    return work


def update(name: str, number_format: str) -> Callable[[int], float]:
    model = make_model(name)
    ids = random_ids(LENGTH, model.config.vocab_size)
    mask = (torch.arange(LENGTH) % 2).expand_as(ids)
    is_half = number_format == "bfloat16"

    def work(number: int) -> float:
        start = process_time()
        with torch.autocast("cpu", torch.bfloat16) if is_half else nullcontext():
            logprobs, _ = score(model, ids, torch.ones_like(ids), mask)
        logprobs.sum().backward()
        return process_time() - start

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "256", "512", "768"])
    parser.add_argument("--threads", type=int, default=measure.cores(), help="CPU threads a side")
    parser.add_argument("--repeats", type=int, default=3, help="calls a side, by turns")
    options = parser.parse_args()
    print(measure.machine(options.threads))
    print("| model | work | float32, s | bfloat16, s | bfloat16 is faster |")
    print("|---|---|---|---|---|")
    for model in options.models:
        for kind in (generation, update):
            sides = {
                name: measure.Side(kind, model, name, threads=options.threads) for name in FORMATS
            }
            with measure.together(sides):
                measured = measure.take_turns(sides, options.repeats)
            single, half = [median(run.value for run in measured[name]) for name in FORMATS]
            cells = [model, kind.__name__, f"{single:.2f}", f"{half:.2f}", f"{single / half:.2f} x"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
