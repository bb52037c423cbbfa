"""Activations of an update: what a forward and backward pass needs above weights and gradients.

    python benchmarks/memory.py [--shapes 1.5B 3B 7B] [--tokens 2048] [--layers 1 3]
    python benchmarks/memory.py --shapes 1.5B --layers 20 28 --checkpointing yes    # 16 GB

A random model with the widths and the vocabulary of a Qwen2.5 scores one micro-batch. Half of its
tokens are in the loss. It computes in bfloat16 under autocast over float32 weights, as a run on a
GPU does.

Layers are alike. So two models with few layers are measured, and a straight line through both
gives the activations of the real depth. They hold the bfloat16 copies of weights that autocast
makes. With `--gradient_checkpointing` the line misses: the peak of few layers is the head's, and
that of many layers is the forward pass's. Then measure nearly the whole model.

A peak is the resident size of the process, on a GPU what PyTorch allocated.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from minizs.logprobs import score
from minizs.models import loading, weights

# Layers, and the widths of https://huggingface.co/Qwen: hidden, MLP, heads, key-value heads, tied.
SHAPES = {
    "1.5B": (28, 1536, 8960, 12, 2, True),
    "3B": (36, 2048, 11008, 16, 2, True),
    "7B": (28, 3584, 18944, 28, 4, False),
    "tiny": (2, 64, 128, 2, 2, True),
}
ROW = 512  # tokens of a trajectory


def make(shape: str, layers: int, checkpointing: bool, vocab: int):
    """A function of positions and seed: a forward and a backward pass."""
    _, hidden, width, heads, kv_heads, tied = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).to(loading.device()).eval()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)  # no zeros: pages of them may be given back
    if checkpointing:
        weights.checkpoint_layers(model)

    def work(tokens: int, seed: int) -> float:
        row = min(ROW, tokens)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocab, (tokens // row, row), generator=generator).to(model.device)
        mask = (torch.arange(row, device=model.device) % 2).expand_as(ids)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = -score(model, ids, torch.ones_like(ids), mask)[0].sum() / mask.sum()
        loss.backward()
        return loss.item()

    return work


def peak(shape: str, layers: int, checkpointing: bool, args: argparse.Namespace) -> float:
    """The peak of a model with so many layers, in GB, in a process of its own."""
    side = measure.Side(make, shape, layers, checkpointing, args.vocab, threads=args.threads)
    with measure.together({"": side}):
        side(min(64, args.tokens), 0)  # to warm up
        return side(args.tokens, 1).peak / 1e9


def print_row(shape: str, checkpointing: str, args: argparse.Namespace) -> None:
    """Measure two depths, and print the line through both at the shape's real depth."""
    few, many = args.layers
    peak_of_few = peak(shape, few, checkpointing == "yes", args)
    peak_of_many = peak(shape, many, checkpointing == "yes", args)
    layer = (peak_of_many - peak_of_few) / (many - few)
    rest = peak_of_few - few * layer
    real_layers = SHAPES[shape][0]
    whole = rest + real_layers * layer
    print(
        f"| {shape} | {checkpointing} | {layer:.3f} | {rest:.2f} | {whole:.1f} |",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", default=["1.5B", "3B", "7B"], choices=SHAPES, help="sizes of models"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="positions of a micro-batch")
    parser.add_argument(
        "--layers", type=int, nargs=2, default=[1, 3], help="the two depths that are measured"
    )
    parser.add_argument(
        "--checkpointing",
        nargs="+",
        choices=("no", "yes"),
        default=["no"],
        help="whether activations are computed twice instead of being kept",
    )
    parser.add_argument("--vocab", type=int, default=152_064, help="rows of the embedding")
    parser.add_argument("--threads", type=int, default=measure.cores(), help="CPU threads")
    args = parser.parse_args(argv)
    print(measure.machine(args.threads))
    print(f"A micro-batch of {args.tokens} positions; GB\n")
    print("| shape | gradient checkpointing | a layer more | without layers | all layers |")
    print("|---|---|---|---|---|")
    for shape in args.shapes:
        for checkpointing in args.checkpointing:
            print_row(shape, checkpointing, args)


if __name__ == "__main__":
    main()
