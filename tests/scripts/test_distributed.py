"""Several processes do what one does: DDP and FSDP2, on two CPU processes, in float64."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from scripts import POLICY, ROOT, metrics

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # Accelerate's default, and wrong for tied weights
}
FLAGS = [*POLICY, "--steps", "5", "--kl_coef", "0.1", "--lr", "0.003"]


def run(work, processes: int, *flags: str, **environment: str) -> list[dict]:
    """What `in_double.py` noted of each step: the trajectories and the whole weights."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else [])]
    command += [str(ROOT / "tests" / "in_double.py"), *FLAGS, *flags]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command,
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return torch.load(work / "runs" / "steps.pt", weights_only=False)


def same(one: list[dict], other: list[dict]) -> None:
    """The same trajectories, token for token, and the same weights to rounding."""
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a["texts"] == b["texts"]
        torch.testing.assert_close(a["weights"], b["weights"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_two_processes_learn_what_one_learns(work, algorithm):
    """Under DDP and FSDP2 the trajectories and weights of each step are those of one process."""
    (work / "runs").mkdir()
    flags = ["--algorithm", algorithm, "--output"]
    one = run(work, 1, *flags, "runs/one")
    assert not torch.equal(one[0]["weights"], one[-1]["weights"])
    if algorithm == "grpo":
        same(one, run(work, 2, *flags, "runs/ddp"))
    same(one, run(work, 2, *flags, "runs/fsdp", **SHARDED))


def test_a_sharded_run_resumes(work):
    """Sharded policy, critic and optimisers are restored to the same trajectories and weights."""
    (work / "runs").mkdir()
    flags = ["--algorithm", "ppo", "--save_every", "3", "--output", "runs/fsdp"]
    whole = run(work, 2, *flags, **SHARDED)
    lines = metrics(work / "runs" / "fsdp")
    point = "runs/fsdp/checkpoints/step-3"
    same(whole[3:], run(work, 2, *flags, "--resume", point, **SHARDED))
    assert metrics(work / "runs" / "fsdp") == lines


@pytest.mark.parametrize("algorithm, how", [("grpo", {}), ("ppo", SHARDED)])
def test_all_skip_what_is_not_finite_on_one(work, algorithm, how):
    """A loss that is not finite on one process makes all of them skip the step."""
    (work / "runs").mkdir()
    flags = ["--algorithm", algorithm, "--save_every", "1", "--output", "runs/two"]
    rows = run(work, 2, *flags, SPOIL="2", **how)
    weights = [row["weights"] for row in rows]
    assert [row["rewards"]["skipped"] for row in rows] == [0, 0, 1, 0, 0]
    assert [torch.equal(a, b) for a, b in pairwise(weights)] == [False, True, False, False]
    assert [row["skipped"] for row in metrics(work / "runs" / "two")] == [0, 0, 1, 1, 1]
    assert len((work / "runs" / "two" / "suspects.jsonl").read_text().splitlines()) > 0


def test_half_precision_under_fsdp2(work):
    """LoRA and checkpointed layers train in bfloat16 under FSDP2."""
    (work / "runs").mkdir()
    for options in (
        ["--lora_rank", "4", "--algorithm", "ppo"],
        ["--gradient_checkpointing", "true", "--freeze_embeddings"],
    ):
        flags = [
            *options,
            "--dtype",
            "bfloat16",
            "--steps",
            "2",
            "--output",
            f"runs/{len(options)}",
        ]
        one, two = run(work, 2, *flags, **SHARDED)
        assert not torch.equal(one["weights"], two["weights"])


def test_frozen_embeddings_in_two_processes(work):
    """Under DDP and FSDP2 the layers learn what they learn in one process, and the embedding stays
    as it was."""
    (work / "runs").mkdir()
    flags = ["--freeze_embeddings", "--output"]
    one = run(work, 1, *flags, "runs/one")
    same(one, run(work, 2, *flags, "runs/ddp"))
    same(one, run(work, 2, *flags, "runs/fsdp", **SHARDED))
    base = load_file(work.parent / "base/model.safetensors")
    for name in ("one", "ddp", "fsdp"):
        trained = load_file(work / "runs" / name / "policy/model.safetensors")
        assert torch.equal(trained["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_lora_under_fsdp2(work):
    """LoRA under FSDP2 learns what one process learns, and merges to the same model."""
    (work / "runs").mkdir()
    flags = ["--lora_rank", "4", "--merge", "--output"]
    same(run(work, 1, *flags, "runs/one"), run(work, 2, *flags, "runs/fsdp", **SHARDED))
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(work / "runs" / name / "policy")
        for name in ("one", "fsdp")
    ]
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits)
