"""Activations of an update: what a forward and backward pass needs above weights and gradients.

    python benchmarks/memory.py [--shapes 1.5B 3B 7B] [--tokens 2048] [--layers 1 3]
    python benchmarks/memory.py --shapes 1.5B --layers 20 28 --checkpointing yes    # 16 GB

A random model with a Qwen2.5's widths and vocabulary, but few layers, scores one micro-batch, half
of whose tokens are in the loss, in bfloat16 under autocast over float32 weights, as a run on a GPU
does; with `--gradient_checkpointing` and without. Layers are alike, so what one more layer adds,
measured, times the layers of the real shape, and what is there without layers give its activations.
They hold the bfloat16 copies of weights that autocast makes. With checkpointing the peak of few
layers is the head's, that of many the forward pass's, with all of those copies: a line through two
small models misses it, so measure nearly the whole one. Peaks are the resident size of the process,
on a GPU what PyTorch allocated.
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1.5B", "3B", "7B"], choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=2048, help="positions of a micro-batch")
    parser.add_argument("--layers", type=int, nargs=2, default=[1, 3], help="of what is measured")
    parser.add_argument("--checkpointing", nargs="+", choices=("no", "yes"), default=["no"])
    parser.add_argument("--vocab", type=int, default=152_064)
    parser.add_argument("--threads", type=int, default=measure.cores())
    args = parser.parse_args(argv)
    print(measure.machine(args.threads))
    print(f"A micro-batch of {args.tokens} positions; GB\n")
    print("| shape | gradient checkpointing | a layer more | without layers | all layers |")
    print("|---|---|---|---|---|")
    for shape in args.shapes:
        for checkpointing in args.checkpointing:
            peaks = []
            for layers in args.layers:
                side = measure.Side(
                    make, shape, layers, checkpointing == "yes", args.vocab, threads=args.threads
                )
                with measure.together({"": side}):
                    side(min(64, args.tokens), 0)  # to warm up
                    peaks.append(side(args.tokens, 1).peak / 1e9)
            few, more = args.layers
            layer = (peaks[1] - peaks[0]) / (more - few)
            rest = peaks[0] - few * layer
            print(
                f"| {shape} | {checkpointing} | {layer:.3f} | {rest:.2f} | "
                f"{rest + SHAPES[shape][0] * layer:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
