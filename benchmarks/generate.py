"""Generation: minizs beside `transformers`, on four workloads, and beside what the machine allows.

    python benchmarks/generate.py [--batch 8 64 256] [--threads 2] [--repeats 3]
    python benchmarks/generate.py --model large          # 107 M parameters, batch 64, equal lengths
    python benchmarks/generate.py --model large --dtype bfloat16 --workloads wide --batch 16 64

- `equal`: prompts of 32 tokens, 32 new ones.
- `mixed`: every row is a turn of a real rollout (`--policy` in the tiny world, with BM25): what
  stood before it is its prompt, and it writes as many tokens as that turn had.
- `wide`: as mixed as a larger model's rollouts: prompts of 20 to 400 tokens, 2 to 64 new ones.
- `groups`: groups of 8 share a prompt of 150 tokens (about the paper's), 2 to 64 new ones.

How many tokens a row writes is given, nothing ends it early, so that all sides do the same work:
- `minizs`: `generate`; a row that has its tokens leaves.
- `dynamic`, `static`: `model.generate` with this cache, pure sampling, prompts padded on the left;
  rows that have their tokens stay until the last one has, and these extra tokens do not count.
- `continuous`: the library's continuous batching, every request with its own length, a cache as
  large as needed, and room for all in one batch.

The floor of a workload: the bytes of weights and cache that its forward passes have to read over
the rate at which this machine reads memory, plus their floating-point operations over its rate of
matrix products, both measured here. Shared prompts are computed once in it, and rows leave.
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from minizs.engines.bm25 import BM25
from minizs.generate import generate
from minizs.models import loading, weights
from minizs.rollout import Limits, Policy, rollout
from minizs.runs import data
from minizs.world.facts import embedded

GROUP, PAGE = 8, 32
SHAPES = {  # hidden, layers, heads, key-value heads, intermediate, ids; then Qwen2.5's
    "large": (768, 12, 12, 4, 2304, 32000),
    "1.5b": (1536, 28, 12, 2, 8960, 151936),
    "3b": (2048, 36, 16, 2, 11008, 151936),
}


@dataclass(frozen=True)
class Workload:
    """Prompts of token ids, and how many tokens each row is to write."""

    prompts: list[list[int]]
    new: list[int]


def make_model(name: str, number_format: str = "auto"):
    """A model of `SHAPES` with random weights, or the one that `loading.load_model` knows."""
    device = loading.device()
    dtype = weights.named_dtype(number_format, device)
    if name not in SHAPES:
        return loading.load_model(name, device, dtype)[0]
    hidden, layers, heads, kv_heads, intermediate, vocab = SHAPES[name]
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    with device:
        return weights.cast_weights(Qwen2ForCausalLM(config), dtype).eval()


def real_turns(policy: str, questions: int, limits: Limits) -> list[tuple[list[int], int]]:
    """(all ids before it, its tokens) of every turn of some rollouts, shuffled."""
    model, tokenizer = loading.load_model(policy)
    world = embedded("train")
    rows = rollout(
        Policy(model, tokenizer, loading.load_prompt(policy), limits),
        data.load_examples("world", "train")[:questions],
        BM25(world.documents, 3, world.judge),
        group_size=GROUP,
    )
    turns = []
    for row in rows:
        edges = [i for i in range(1, len(row.ids)) if row.loss_mask[i] != row.loss_mask[i - 1]]
        edges.append(len(row.ids))
        turns += [(row.ids[:a], b - a) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    random.Random(0).shuffle(turns)
    return turns


def workload(kind: str, batch: int, turns: list[tuple[list[int], int]], new: int) -> Workload:
    """`turns`: those of `real_turns`. `new`: tokens that a row writes, or at most writes."""
    rng = random.Random(batch)

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, 600) for _ in range(length)]

    def some() -> int:
        return min(2 * new, 2 + int(rng.expovariate(1 / (0.7 * new))))

    if kind == "equal":
        return Workload([ids(32) for _ in range(batch)], [new] * batch)
    if kind == "mixed":
        chosen = [turns[i % len(turns)] for i in range(batch)]
        return Workload([before for before, _ in chosen], [count for _, count in chosen])
    if kind == "wide":
        return Workload(
            [ids(rng.randint(20, 400)) for _ in range(batch)], [some() for _ in range(batch)]
        )
    shared = [ids(150) for _ in range(ceil(batch / GROUP))]
    return Workload([shared[i // GROUP] for i in range(batch)], [some() for _ in range(batch)])


def minizs(name: str, number_format: str) -> Callable[[Workload, int], int]:
    model = make_model(name, number_format)

    def work(load: Workload, seed: int) -> int:
        return sum(
            len(row.ids) for row in generate(model, load.prompts, load.new, seed=seed, eos_id=())
        )

    return work


def library(name: str, number_format: str, cache: str) -> Callable[[Workload, int], int]:
    model = make_model(name, number_format)
    model.generation_config.eos_token_id = None
    logging.set_verbosity_error()

    def work(load: Workload, seed: int) -> int:
        torch.manual_seed(seed)
        width = max(map(len, load.prompts))
        ids = [[0] * (width - len(prompt)) + prompt for prompt in load.prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in load.prompts]
        out = model.generate(
            torch.tensor(ids, device=model.device),
            max_new_tokens=max(load.new),
            do_sample=True,
            attention_mask=torch.tensor(mask, device=model.device),
            top_k=0,
            top_p=1.0,
            cache_implementation=cache,
            pad_token_id=0,
        )
        rows = zip(out[:, width:].tolist(), load.new, strict=True)
        return sum(len(row[:budget]) for row, budget in rows)

    return work


def continuous(name: str, number_format: str) -> Callable[[Workload, int], int]:
    model = make_model(name, number_format)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    logging.set_verbosity_error()

    def work(load: Workload, seed: int) -> int:
        settings = GenerationConfig(
            do_sample=True,
            top_k=0,
            top_p=1.0,
            eos_token_id=-1,
            pad_token_id=0,
            max_new_tokens=max(load.new),
        )
        rows = list(zip(load.prompts, load.new, strict=True))
        batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=sum(ceil((len(p) + n) / PAGE) + 1 for p, n in rows),
            max_batch_tokens=sum(map(len, load.prompts)),
            max_requests_per_batch=len(rows),
            seed=seed,
        )
        written = 0
        with model.continuous_batching_context_manager(
            settings, continuous_batching_config=batching
        ) as manager:
            for prompt, new in rows:
                manager.add_request(prompt, max_new_tokens=new)
            for _ in rows:
                result = manager.get_result(timeout=300)
                if result is None or result.error:
                    raise RuntimeError(f"continuous batching failed: {result and result.error}")
                written += len(result.generated_tokens)
        return written

    return work


def floor(model, load: Workload, read_rate: float, matrix_rate: float) -> float:
    """Seconds; see the top of this file. The first new token comes from the prompt's forward."""
    config = model.config
    rows = list(zip(load.prompts, load.new, strict=True))
    head = config.hidden_size * config.vocab_size
    body = sum(p.numel() for p in model.get_decoder().parameters()) - head  # embeddings: a look-up
    item = model.dtype.itemsize
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    a_position = 2 * layers * config.num_key_value_heads * width * item
    scores = 4 * layers * heads * width  # operations of a query with one key and its value
    prompts = {tuple(prompt) for prompt in load.prompts}
    read = sum(len(p) + step for p, n in rows for step in range(1, n))  # cache positions, decoding
    forwards = max(load.new)
    size = forwards * (body + head) * item + read * a_position
    attended = read + sum(len(prompt) ** 2 // 2 for prompt in prompts)
    fed = sum(map(len, prompts)) + sum(load.new) - len(rows)
    work = 2 * body * fed + 2 * head * sum(load.new) + scores * attended
    return size / read_rate + work / matrix_rate


SIDES = {
    "minizs": (minizs,),
    "dynamic": (library, "dynamic"),
    "static": (library, "static"),
    "continuous": (continuous,),
}
KINDS = ("equal", "mixed", "wide", "groups")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help=f"tiny, a folder, or {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="auto", help="as that of train_policy.py")
    parser.add_argument("--policy", default="tiny", help="whose rollouts are 'mixed'")
    parser.add_argument("--workloads", nargs="+", choices=KINDS, help="default: all that fit")
    parser.add_argument("--batch", type=int, nargs="+", help="rows; default 8 64 256, or 64")
    parser.add_argument("--new", type=int, default=32, help="tokens a row writes; twice at most")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--continuous_up_to", type=int, default=64, help="rows; it is slow")
    parser.add_argument("--questions", type=int, default=32, help="of the rollouts")
    parser.add_argument("--threads", type=int, default=measure.cores(), help="CPU threads a side")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    kinds = args.workloads or (KINDS[:1] if args.model in SHAPES else KINDS)
    turns = (
        real_turns(args.policy, args.questions, Limits(6, 40, 80, 448)) if "mixed" in kinds else []
    )
    model = make_model(args.model, args.dtype)
    rates = (measure.read_rate(model.device), measure.matrix_rate(model.device, model.dtype))
    print(measure.machine(args.threads))
    print(
        f"{args.model}: {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}; memory "
        f"is read at {rates[0] / 1e9:.1f} GB/s, matrix products run at {rates[1] / 1e9:.0f} "
        "GFLOP/s\n"
    )
    print("| workload | batch | side | tokens/s | minizs is faster | peak MB | floor reached |")
    print("|---|---|---|---|---|---|---|")
    sides = {
        name: measure.Side(make, args.model, args.dtype, *arguments, threads=args.threads)
        for name, (make, *arguments) in SIDES.items()
        if name in args.sides
    }
    with measure.together(sides):
        table(args, kinds, turns, model, sides, rates)


def table(args, kinds, turns, model, sides: dict[str, measure.Side], rates) -> None:
    """Measure every side on every workload, and print a line for each."""
    for kind in kinds:
        for batch in args.batch or ([64] if args.model in SHAPES else [8, 64, 256]):
            load = workload(kind, batch, turns, args.new)
            able = {
                name: side
                for name, side in sides.items()
                if name != "continuous" or batch <= args.continuous_up_to
            }
            measured = measure.take_turns(able, args.repeats, load)
            least = floor(model, load, *rates)
            base = next(iter(measured.values()))
            for name, runs in measured.items():
                if any(run.value != sum(load.new) for run in runs):
                    raise RuntimeError(f"{name} has not written what it was to write")
                taken = measure.seconds(runs)
                print(
                    f"| {kind} | {batch} | {name} | {sum(load.new) / taken:.0f} | "
                    f"{taken / measure.seconds(base):.2f} x | {measure.peak(runs):.0f} | "
                    f"{least / taken:.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
