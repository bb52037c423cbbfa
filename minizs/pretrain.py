"""Make the tiny base model from nothing.

    torchrun --nproc_per_node 2 -m minizs.pretrain --output DIR

That is how the shipped one, minizs/tiny_base, was made: two processes of one thread each. It is a
small Qwen3 whose matrices learn with Muon (torch.optim.Muon) and all else with AdamW, which took
half the steps that AdamW alone took. Reading is the skill that comes late: it starts with reciting
two documents. The model is saved every 500 steps.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from minizs import base, models, runs, sft
from minizs.config import check_ranges, option, parse, require, run_script, save, set_threads


@dataclass
class PretrainConfig:
    output: str = option("runs/base", "The model's folder.")
    overwrite: bool = option(False, "Delete what the output folder holds.")
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


def main(argv: list[str] | None = None) -> None:
    config = parse(PretrainConfig, argv)
    check_ranges(config, "steps batch_tokens hidden layers lr", "threads")
    require(config.hidden % 8 == 0, "--hidden must be a multiple of 8.")
    folder = Path(config.output)
    runs.check_free(folder, resume=False, overwrite=config.overwrite)
    set_threads(config.threads)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    tokenizer = base.make_tokenizer()
    model = make_model(tokenizer, config.hidden, config.layers, config.seed)
    trained = accelerator.prepare(sft.Supervised(model))
    matrices, others = [], []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "embed" not in name else others).append(weight)
    muon = torch.optim.Muon(matrices, lr=config.lr, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=config.lr / 4, weight_decay=0.0, betas=(0.9, 0.95))
    rank, progress = accelerator.process_index, 0.0
    rng = random.Random(f"pretrain {config.seed} {rank}")
    stream = base.stream(config.seed * 1000 + rank, lambda: mixture(progress), lambda: progress)
    texts = (sft.encode(tokenizer, segments, end=end) for segments, end in stream)
    batches = sft.batches(texts, config.batch_tokens, rng, pool=256)
    if rank == 0:
        runs.RunFolder(folder, config.overwrite)
        save(config, folder / "settings.yaml")
    steps = tqdm(range(1, config.steps + 1), disable=rank > 0, dynamic_ncols=True, mininterval=2)
    for step in steps:
        progress = step / config.steps
        share = min(1.0, step / 30, (1.02 - progress) / 0.6)
        for optimizer, peak in ((muon, config.lr), (adam, config.lr / 4)):
            optimizer.param_groups[0]["lr"] = peak * share
        loss, count = trained(*sft.collate(next(batches), accelerator.device))
        accelerator.backward(loss / count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            steps.set_postfix(loss=f"{(loss / count).item():.3f}")
        if rank == 0 and (step == config.steps or step % 500 == 0):
            models.save(model, tokenizer, folder, prompt=base.PROMPT,
                        simulator_prompt=base.SIMULATOR_PROMPT)  # fmt: skip
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_script(main)
