"""Frozen embeddings: what does not learn, is not copied, and changes nothing else."""

import shutil

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from scripts import metrics, policy, simulator, weights
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config

import train_policy
from minizs.models import flash
from minizs.models.weights import freeze_embeddings, frozen_copy, learned_weights, make_writer

FROZEN = ["--freeze_embeddings", "--lr", "0.01"]
WARM = "--warm_start scripted --warm_start_steps 3 --warm_start_tokens 400 --top_k 1".split()
HALF = ["--dtype", "bfloat16"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def unchanged(folder, base) -> dict[str, bool]:
    """For each weight of two model folders whether it is the same in both."""
    before = load_file(base / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    return {name: torch.equal(before[name].to(after[name].dtype), after[name]) for name in before}


@pytest.mark.parametrize("tied", [True, False])
def test_all_other_weights_get_the_gradients_that_they_had(family, tied):
    """Of a model whose head is the embedding, too, and of one whose head is its own."""
    ids = torch.arange(5, 25)[None]
    whole = make_model(family, tie_word_embeddings=tied)
    model = make_model(family, tie_word_embeddings=tied)
    freeze_embeddings(model, torch.float32)
    for one in (whole, model):
        one(ids, labels=ids).loss.backward()
    gradients = dict(whole.named_parameters())
    for name, weight in model.named_parameters():
        if any(weight is matrix for matrix in matrices(model)):
            assert weight.grad is None and gradients[name].grad is not None
        else:
            torch.testing.assert_close(weight.grad, gradients[name].grad)
    assert len(learned_weights(model)) == len(gradients) - (1 if tied else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_share_what_does_not_learn(dtype):
    """The model that generates and the reference hold no second copy of the embedding; what learns
    they do copy, and the embedding of a model that learns as well."""
    model = make_model(tie_word_embeddings=True)
    freeze_embeddings(model, dtype)
    [embedding] = {id(matrix): matrix for matrix in matrices(model)}.values()
    assert embedding.dtype == dtype
    copies = [frozen_copy(model, dtype), make_writer(model, dtype, "cpu", sharded=True)()]
    for copied in copies:
        assert all(matrix is embedding for matrix in matrices(copied))
        for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
            assert (mine.data_ptr() == theirs.data_ptr()) == (theirs is embedding)
            assert mine.dtype == dtype and not mine.requires_grad
    learning = make_model()
    for mine, theirs in zip(
        frozen_copy(learning, torch.float32).parameters(), learning.parameters(), strict=True
    ):
        assert mine.data_ptr() != theirs.data_ptr() and theirs.requires_grad


def test_a_model_of_two_formats_is_copied_to_generate():
    """Where the embedding alone is in the format of the forward pass, the model cannot generate
    itself: its layers are in another."""
    model = make_model(dtype=torch.float32)
    freeze_embeddings(model, torch.bfloat16)
    writer = make_writer(model, torch.bfloat16, "cpu")
    assert {weight.dtype for weight in writer().parameters()} == {torch.bfloat16}
    assert writer() is not model


@pytest.mark.parametrize(
    "flags",
    [
        [],
        HALF,
        [*HALF, "--algorithm", "ppo"],
        [*HALF, "--gradient_checkpointing"],
        [*HALF, *WARM],
    ],
    ids=" ".join,
)
def test_a_policy_learns_with_the_embedding_of_its_base(work, flags):
    """Each layer learns, the embedding stays; a run that goes on from its checkpoint ends with the
    same weights."""
    policy(*FROZEN, *flags, "--save_every", "1", "--output", "run")
    same = unchanged(work / "run/policy", work.parent / "base")
    assert [name for name, is_same in same.items() if is_same] == ["model.embed_tokens.weight"]
    shutil.copytree("run", "again")
    shutil.rmtree("again/checkpoints/step-2")
    shutil.rmtree("again/policy")
    train_policy.main(["--output", "again", "--resume"])
    assert weights(work / "again/policy") == weights(work / "run/policy")
    assert metrics(work / "again") == metrics(work / "run")


def test_a_simulator_learns_with_the_embedding_of_its_base(work):
    simulator("--freeze_embeddings", "--output", "sim")
    same = unchanged(work / "sim", work.parent / "base")
    assert [name for name, is_same in same.items() if is_same] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    "config",
    [Gemma3TextConfig(head_dim=16, **SMALL), Qwen2Config(**SMALL)],
    ids=["gemma3", "qwen2"],
)
def test_a_model_of_two_formats_can_still_be_packed(config):
    """Packing is tried on the model as it is trained. Gemma's norms keep the embedding's format, so
    that its layers need autocast."""
    model = AutoModelForCausalLM.from_config(config)
    freeze_embeddings(model, torch.bfloat16)
    assert flash.keeps_apart(model)


def test_a_lora_freezes_them_anyway(work):
    """So the setting changes nothing about a LoRA."""
    for output, flags in (("with", ["--freeze_embeddings"]), ("without", [])):
        policy("--lora_rank", "4", *HALF, *flags, "--output", output)
    adapters = [(work / run / "policy/adapter_model.safetensors") for run in ("with", "without")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
