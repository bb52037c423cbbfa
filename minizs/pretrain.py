"""Make the tiny base model from nothing.

    torchrun --nproc_per_node 2 -m minizs.pretrain --output minizs/tiny_base

That is how the shipped one was made: two processes of one thread each. It is a small Qwen3 whose
matrices learn with Muon (torch.optim.Muon) and all else with AdamW, which took half the steps that
AdamW alone took. Reading is the skill that comes late: it starts with reciting two documents.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minizs import base, sft
from minizs.config import option, parse, require, run_script, set_threads


@dataclass
class PretrainConfig:
    output: str = option("runs/base", "The model's folder.")
    steps: int = option(4500, "Optimiser steps.")
    batch_tokens: int = option(1500, "Positions a step and process, padding counted.")
    hidden: int = option(128, "Width of the model.")
    layers: int = option(3, "Its layers.")
    lr: float = option(0.02, "Peak learning rate of Muon; AdamW has a quarter of it.")
    seed: int = option(0, "Decides weights and texts.")
    threads: int = option(0, "CPU threads a process; 0: all cores, shared by the processes.")


def mixture(progress: float) -> tuple[float, float, float, float]:
    """Weights of recitals, drills, demonstrations and pages at this share of the training."""
    if progress < 0.1:
        return 1.0, 0.0, 0.0, 0.0
    if progress < 0.35:
        return 0.2, 0.6, 0.1, 0.1
    return 0.0, 0.3, 0.5, 0.2


def make_model(tokenizer, hidden: int, layers: int, seed: int):
    """A Qwen3 with random weights. A small RoPE base makes short distances easy to tell apart."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        head_dim=hidden // 4, max_position_embeddings=1024, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 200.0},
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.1 if "embed" in name else weight.shape[1] ** -0.5)
    return model


def texts(seed: int, tokenizer, progress: dict[str, float]) -> Iterator[sft.Tokens]:
    """Encoded training texts whose mixture follows `progress["now"]`."""
    stream = base.stream(seed, lambda: mixture(progress["now"]), lambda: progress["now"])
    for segments, end in stream:
        yield sft.encode(tokenizer, segments, end=end)


def main(argv: list[str] | None = None) -> None:
    config = parse(PretrainConfig, argv)
    require(config.steps > 0 and config.layers > 0, "--steps and --layers must be greater than 0.")
    require(config.hidden > 0 and config.hidden % 8 == 0, "--hidden must be a multiple of 8.")
    set_threads(config.threads)
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    from minizs import models

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    tokenizer = base.make_tokenizer()
    model = make_model(tokenizer, config.hidden, config.layers, config.seed)
    trained = accelerator.prepare(sft.Supervised(model))
    is_matrix = {p: p.ndim == 2 and "embed" not in n for n, p in model.named_parameters()}
    matrices = [p for p, yes in is_matrix.items() if yes]
    others = [p for p, yes in is_matrix.items() if not yes]
    optimizers = (
        torch.optim.Muon(matrices, lr=config.lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=config.lr / 4, weight_decay=0.0, betas=(0.9, 0.95)),
    )
    peaks = (config.lr, config.lr / 4)
    rank, progress = accelerator.process_index, {"now": 0.0}
    rng = random.Random(f"pretrain {config.seed} {rank}")
    stream = texts(config.seed * 1000 + rank, tokenizer, progress)
    stream = sft.batches(stream, config.batch_tokens, rng, pool=256)
    steps = tqdm(range(1, config.steps + 1), disable=rank > 0, dynamic_ncols=True, mininterval=2)
    for step in steps:
        progress["now"] = step / config.steps
        share = min(1.0, step / 30, (1.02 - progress["now"]) / 0.6)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        loss, count = trained(*sft.collate(next(stream), accelerator.device))
        accelerator.backward(loss / count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            steps.set_postfix(loss=f"{(loss / count).item():.3f}")
        if rank == 0 and (step == config.steps or step % 500 == 0):
            models.save(model, tokenizer, Path(config.output), prompt=base.PROMPT,
                        simulator_prompt=base.SIMULATOR_PROMPT)  # fmt: skip
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_script(main)
