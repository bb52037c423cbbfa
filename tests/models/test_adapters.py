"""LoRA: what is trained and what is not, from the first step to the folder that others load."""

import json
import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scripts import FILE, evaluation, metrics, policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from minizs import UserError
from minizs.models import loading, lora

IDS = torch.arange(5, 25)[None]
# `peft` asks `transformers` under an older name, which is no call of ours.
OF_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
FLAGS = "--lora_rank 4 --kl_coef 0.1 --steps 4 --group_size 4 --lr 0.05".split()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture
def trained(monkeypatch) -> list:
    """The models that runs of this test train."""
    seen = []
    add = lora.add_lora

    def spied(model, *rest):
        add(model, *rest)
        seen.append(model)

    monkeypatch.setattr(lora, "add_lora", spied)
    return seen


def adapter(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_nothing_and_alone_is_trained(family, dtype):
    """A new LoRA changes no logit, is float32, and alone learns."""
    model, before = make_model(family, dtype), make_model(family, dtype)
    lora.add_lora(model, 3, seed=1)
    assert torch.equal(logits(model), logits(before))
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(own) == 2 * 7 * 2 and all("lora_" in name for name in own)  # not on the head
    assert {weight.dtype for weight in own.values()} == {torch.float32}
    frozen = [p for name, p in model.named_parameters() if name not in own]
    assert all(map(torch.equal, frozen, before.parameters()))
    same, other = make_model(family, dtype), make_model(family, dtype)
    lora.add_lora(same, 3, seed=1)
    lora.add_lora(other, 3, seed=2)
    for name, weight in own.items():  # all processes start alike
        assert torch.equal(weight, same.get_parameter(name))
    assert any(not torch.equal(p, other.get_parameter(name)) for name, p in own.items())


def test_switched_off_it_is_the_base():
    """Inside `lora_off` the logits are the base model's, and afterwards the policy's again."""
    model = make_model()
    base = logits(model)
    lora.add_lora(model, 2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    changed = logits(model)
    assert (changed - base).abs().max() > 0.1
    with pytest.raises(ZeroDivisionError), lora.lora_off(model):
        assert torch.equal(logits(model), base)
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), changed)


def test_a_run_from_end_to_end(work, trained):
    """The base stays, the KL is to it, and the saved LoRA gives the trained policy's logits."""
    policy(*FLAGS, "--output", "run", "--save_every", "2", "--eval_every", "4")
    rows = metrics(work / "run")
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 1e-4
    [model] = trained
    base, _ = loading.load_model("../base")
    weights = {name.replace(".base_layer", ""): w for name, w in model.named_parameters()}
    assert all(torch.equal(weight, weights[name]) for name, weight in base.named_parameters())
    folder = work / "run" / "policy"
    assert not (folder / "model.safetensors").exists() and not (work / "run" / "adapter").exists()
    assert len(adapter(folder)) < 0.5 * (work.parent / "base" / "model.safetensors").stat().st_size
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)
    assert (logits(loaded) - logits(base)).abs().max() > 0.01
    evaluation("--policy", "run/policy", *FILE)  # beside the base
    out = json.loads((work / "run" / "evaluation.json").read_text())
    assert out["overall"]["n"] == out["before"]["overall"]["n"] == 9


def test_merged_it_is_a_plain_model_of_equal_logits(work, trained):
    """A merged policy is a plain model with the same logits, which `transformers` loads."""
    policy(*FLAGS, "--merge", "True", "--output", "run")
    folder = work / "run" / "policy"
    assert not (folder / "adapter_config.json").exists()
    merged, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), logits(trained[0]), atol=1e-4, rtol=0)
    apart, _ = loading.load_model(str(work / "run" / "adapter"))
    torch.testing.assert_close(logits(merged), logits(apart), atol=1e-4, rtol=0)
    policy("--policy", "run/policy", "--steps", "1")  # and can be trained further


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(work, algorithm):
    """LoRA, optimiser and critic go on after a resume as if there had been no break."""
    flags = [*FLAGS, "--algorithm", algorithm, "--save_every", "2"]
    policy(*flags, "--output", "whole")
    shutil.copytree(work / "whole", work / "cut")
    policy(*flags, "--resume", "cut/checkpoints/step-2")
    assert metrics(work / "cut") == metrics(work / "whole")
    assert adapter(work / "cut" / "policy") == adapter(work / "whole" / "policy")
    assert metrics(work / "cut")[3]["kl"] != 0


def test_in_bfloat16_small_steps_count(work, trained):
    """Over a base in bfloat16 the LoRA is float32, so that steps of 1e-4 change it."""
    policy(*FLAGS[:-2], "--dtype", "bfloat16", "--lr", "1e-4", "--algorithm", "ppo")
    [model] = trained
    base = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in base} == {torch.bfloat16}
    fresh, _ = loading.load_model("../base", dtype=torch.bfloat16)
    lora.add_lora(fresh, 4, 0)
    for (name, weight), start in zip(model.named_parameters(), fresh.parameters(), strict=True):
        moved = (weight - start).abs()
        assert (moved > 0).float().mean() > 0.5 if weight.requires_grad else moved.max() == 0, name
    assert all(row["kl"] < 0.01 for row in metrics(work / "runs" / "policy-1"))


@pytest.fixture
def saved(tmp_path):
    """The folder of a random LoRA, and the model that it was saved from."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    loading.save_model(model, tokenizer, tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    lora.add_lora(model, 3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    loading.save_model(model, tokenizer, tmp_path / "lora")
    return tmp_path / "lora", model


@OF_PEFT
def test_others_read_what_is_saved(saved):
    """The folder is one that `peft`, without this package, loads to the same logits."""
    folder, model = saved
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    theirs = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-6, rtol=0)


@OF_PEFT
def test_what_others_save_is_read(saved):
    """A folder that `peft` writes is loaded with its addition."""
    folder, model = saved
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    PeftModel.from_pretrained(base, folder).save_pretrained(folder.parent / "theirs")
    shutil.copy(folder / "tokenizer.json", folder.parent / "theirs")
    loaded, _ = loading.load_model(str(folder.parent / "theirs"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)


def test_the_version_check_of_transformers_is_not_asked(saved, monkeypatch):
    """LoRA works with a `peft` that `transformers` would refuse for its version."""

    def refuse(*_, **__):
        raise ValueError("this version of peft is refused")

    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", refuse)
    folder, model = saved
    loaded, tokenizer = loading.load_model(str(folder))
    loading.save_model(loaded, tokenizer, folder.parent / "again")
    reloaded, _ = loading.load_model(str(folder.parent / "again"))
    assert torch.equal(logits(reloaded), logits(model))
    fresh = make_model(vocab_size=len(tokenizer))
    merged = lora.merge_lora(fresh, folder)
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)


def lose_a_weight(weights: dict) -> None:
    del weights[min(weights)]


def add_a_weight(weights: dict) -> None:
    weights["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(3, 32)


@pytest.mark.parametrize("change", [lose_a_weight, add_a_weight])
def test_weights_are_all_there_and_all_used(saved, change):
    """A LoRA whose file lacks a weight, or holds one too many, is refused: `peft` only warns."""
    path = saved[0] / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(UserError, match="lora_A.weight"):
        loading.load_model(str(saved[0]))


def test_an_adapter_without_safetensors_or_of_another_kind_is_refused(saved):
    """Nothing is unpickled, and no other kind of adapter is taken for a LoRA."""
    folder, _ = saved
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="save the LoRA as safetensors"):
        loading.load_model(str(folder))
    path = folder / "adapter_config.json"
    base = json.loads(path.read_text())["base_model_name_or_path"]
    path.write_text(json.dumps({"peft_type": "IA3", "base_model_name_or_path": base}))
    with pytest.raises(UserError, match="IA3"):
        loading.load_model(str(folder))
