"""Log-probabilities of half of the tokens, forward and backward: minizs beside full logits.

    python benchmarks/logprobs.py [--vocab 1000 152000] [--batch 8] [--length 512] [--repeats 3]
                                  [--gradient_checkpointing]       # of both sides' layers

The model is a random Qwen3 of 4 layers x 256 in float32 (bfloat16 on a GPU) with tied embeddings.
Each row is a trajectory: blocks of 64 tokens by turns others' and the policy's own; the loss is the
mean log-probability of the latter.

- `minizs`: `score`, which also gives the entropies.
- `full`: `model(...).logits`, a log-softmax over all of (B, T, V), and the tokens' picked out.

Peak memory is that above the model and its gradients, which are there before the clock starts. At
the default sizes and 152,000 ids the full side needs about 8 GB.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from minizs.logprobs import score
from minizs.models import loading, weights

BLOCK = 64


def minizs(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return score(model, ids, torch.ones_like(ids), mask)[0]  # (B, T)


def full(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    logp = torch.log_softmax(logits[:, :-1].float(), -1)  # (B, T-1, V)
    chosen = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(chosen, (1, 0)) * mask  # (B, T)


def make(
    way: Callable, vocab: int, checkpointing: bool = False
) -> Callable[[int, int, int], tuple[float, float]]:
    """A function of batch, length and seed that returns the loss and the gradient's norm."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).to(loading.device())
    if model.device.type == "cuda":
        weights.cast_weights(model, torch.bfloat16)
    if checkpointing:
        weights.checkpoint_layers(model)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)  # no zeros: pages of them may be given back

    def work(batch: int, length: int, seed: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, vocab, (batch, length), generator=generator).to(model.device)
        mask = (torch.arange(length, device=model.device) // BLOCK % 2).expand_as(ids)
        for weight in model.parameters():
            weight.grad.fill_(1)
        loss = -way(model, ids, mask).sum() / mask.sum()
        loss.backward()
        norms = [weight.grad.sub_(1).float().norm() for weight in model.parameters()]
        return loss.item(), torch.stack(norms).norm().item()

    return work


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[1000, 152000])
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=512, help=f"tokens a row, over {BLOCK}")
    parser.add_argument("--threads", type=int, default=measure.cores(), help="CPU threads a side")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args(argv)
    print(measure.machine(args.threads))
    print(f"{args.batch} rows of {args.length} tokens, half of them in the loss\n")
    print("| vocabulary | side | seconds | peak MB | loss | gradient's norm |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for vocab in args.vocab:
        sides = {
            way.__name__: measure.Side(
                make, way, vocab, args.gradient_checkpointing, threads=args.threads
            )
            for way in (minizs, full)
        }
        with measure.together(sides):
            measured = measure.take_turns(sides, args.repeats, args.batch, args.length)
        for name, runs in measured.items():
            loss, norm = runs[-1].value
            print(
                f"| {vocab} | {name} | {measure.seconds(runs):.3f} | {measure.peak(runs):.0f} | "
                f"{loss:.5f} | {norm:.5f} |",
                flush=True,
            )
        ours, theirs = measured.values()
        speed = measure.seconds(theirs) / measure.seconds(ours)
        share = measure.peak(ours) / max(measure.peak(theirs), 1e-9)
        ratios.append(f"{vocab} ids: {speed:.2f} times as fast with {share:.3f} of the memory.")
    print("\n" + "\n".join(ratios))


if __name__ == "__main__":
    main()
