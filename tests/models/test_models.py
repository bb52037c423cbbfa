"""Loading and saving models."""

import json
import pickle
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from minizs import UserError
from minizs.generate import generate
from minizs.models import loading, weights
from minizs.models.lora import add_lora
from minizs.protocol import PROMPT, build_prompt, prompt_ids, vocabulary_size
from minizs.runs import build
from minizs.runs.settings import PolicyConfig, SimConfig


@pytest.fixture
def folder(tmp_path):
    tokenizer = make_tokenizer()
    loading.save_model(
        make_model(vocab_size=len(tokenizer)), tokenizer, tmp_path, prompt="Q: {question}"
    )
    return tmp_path


def test_what_is_saved_is_loaded(folder):
    """Weights, tokenizer and wording come back as they were, in the number format asked for."""
    model, tokenizer = loading.load_model(str(folder))
    expected = make_model(vocab_size=len(tokenizer))
    assert not model.training and model.dtype == torch.float32
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert tokenizer.encode("ab<eos>") == make_tokenizer().encode("ab<eos>")
    assert loading.load_prompt(str(folder)) == "Q: {question}"
    assert loading.load_model(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_folder_without_a_wording_gets_the_papers(folder):
    """A model without a prompt of its own gets the paper's."""
    (folder / loading.PROMPT_FILE).unlink()
    assert loading.load_prompt(str(folder)) == PROMPT


@pytest.mark.parametrize(
    "missing, words",
    [
        ("config.json", "config.json"),
        ("tokenizer", "no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_refused(folder, missing, words):
    """A folder without a configuration or a tokenizer is refused before anything is loaded."""
    for path in folder.glob(missing + "*"):
        path.unlink()
    for function in (loading.check_model, loading.load_model):
        with pytest.raises(UserError, match=words):
            function(str(folder))


def test_names(folder):
    """A hub name is left for later; what can only be a path has to be there."""
    loading.check_model("org/model")
    for name in ("./no", "/no/where", "a/b/c", ""):
        with pytest.raises(UserError, match="no model folder|config.json"):
            loading.check_model(name)
    loading.check_model(str(folder))
    assert loading.resolve("tiny") == str(loading.TINY_BASE)


def test_broken_and_unsupported_models_are_refused(folder):
    """A broken configuration is one sentence, and so is a family that would be computed wrongly."""
    model = MambaForCausalLM(MambaConfig(vocab_size=110, hidden_size=32, num_hidden_layers=1))
    model.save_pretrained(folder / "mamba")
    make_tokenizer().save_pretrained(folder / "mamba")
    with pytest.raises(UserError, match="not supported: its layers of type linear_attention"):
        loading.load_model(str(folder / "mamba"))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.load_model(str(folder))
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.check_model(str(folder))


def test_truncated_weights_are_refused(folder):
    """Weights that were copied or downloaded in part are one sentence."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.load_model(str(folder))


def test_too_long_a_context_is_refused(folder):
    """A context that is longer than the model's positions is refused at the start."""
    loading.check_model(str(folder), 256)
    with pytest.raises(UserError, match="256 positions"):
        loading.check_model(str(folder), 257)


def test_sharded_weights_are_loaded(tmp_path):
    """Weights in several files are read whole, and refused where one is lost."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    tokenizer.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded, _ = loading.load_model(str(tmp_path))
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    shards[0].unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.load_model(str(tmp_path))


def test_an_adapter_is_loaded_onto_its_base(folder, tmp_path):
    """A LoRA's folder, which holds no model, gives its base model with the LoRA on it."""
    model, tokenizer = loading.load_model(str(folder))
    add_lora(model, rank=2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    loading.save_model(model, tokenizer, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    loaded, _ = loading.load_model(str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = loading.load_model(str(folder))[0](ids).logits
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert not torch.allclose(loaded(ids).logits, plain)


@pytest.mark.parametrize("kind", ["llama", "unheard_of"])
def test_code_that_comes_with_a_model_never_runs(folder, kind, monkeypatch):
    """The code in a model's folder is not run, and nobody is asked whether it may be.

    A family that `transformers` knows is loaded without the code, any other is refused.
    """
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    ran = folder / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nConfig = Model = Tokens = object\n"
    (folder / "theirs.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": kind,
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    tokens = {"auto_map": {"AutoTokenizer": ["theirs.Tokens", "theirs.Tokens"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | tokens))
    if kind == "llama":
        assert type(loading.load_model(str(folder))[0]).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(UserError, match="cannot be loaded"):
            loading.load_model(str(folder))
    assert not ran.exists()


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    """A wrong hub name and a missing network are one sentence."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'org/no-model' cannot be loaded: .*connect") as error:
        loading.load_model("org/no-model")
    assert "\n" not in str(error.value)


def test_the_type_to_compute_in(monkeypatch):
    """ "auto" is bfloat16 on a GPU, and on a CPU with instructions for it if the model is not
    small; other names are what they say."""
    for has_instructions in (True, False):
        monkeypatch.setattr(weights, "cpu_has_bfloat16", lambda: has_instructions)  # noqa: B023
        assert weights.named_dtype("auto", "cpu") == torch.float32
        assert weights.named_dtype("auto", "mps", 4096) == torch.float32
        wide = weights.named_dtype("auto", "cpu", weights.WIDE)
        assert wide == (torch.bfloat16 if has_instructions else torch.float32)
        assert weights.named_dtype("auto", "cpu", loading.width("tiny")) == torch.float32
    assert weights.named_dtype("auto", torch.device("cuda:1")) == torch.bfloat16
    assert weights.named_dtype("bfloat16", "cpu") == torch.bfloat16
    assert weights.named_dtype("float32", "cuda") == torch.float32


@pytest.mark.parametrize("machine", ["arm64", "x86_64"])
def test_any_processor_can_be_asked(machine, monkeypatch):
    """Also that of a Mac, for which PyTorch has no mkldnn."""
    monkeypatch.setattr(weights.platform, "machine", lambda: machine)
    assert weights.cpu_has_bfloat16() in (True, False)
    if machine == "arm64":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.setattr(torch.ops, "mkldnn", None)
        assert not weights.cpu_has_bfloat16()


def test_the_width_of_a_model(folder, tmp_path):
    """That of its base for a LoRA; 0 where there is none to be read."""
    assert loading.width(str(folder)) == 32 and loading.width("tiny") == 128
    model, tokenizer = loading.load_model(str(folder))
    model.name_or_path = str(folder)
    add_lora(model, 2)
    loading.save_model(model, tokenizer, tmp_path / "lora")
    assert loading.width(str(tmp_path / "lora")) == 32
    assert loading.width(str(tmp_path / "nothing")) == 0


def test_the_settings_choose_by_the_model_that_computes(folder, monkeypatch):
    """A model that is wide enough computes in bfloat16, and the small one beside it in float32."""
    monkeypatch.setattr(weights, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(loading, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(weights, "WIDE", 100)
    assert build.compute_dtype(PolicyConfig()) == torch.bfloat16
    assert build.compute_dtype(PolicyConfig(), str(folder)) == torch.float32
    assert build.compute_dtype(PolicyConfig(policy=str(folder))) == torch.float32
    assert build.compute_dtype(SimConfig(policy=str(folder))) == torch.bfloat16  # of its base
    assert build.compute_dtype(PolicyConfig(dtype="float32")) == torch.float32


def test_attention_is_chosen_by_what_there_is(monkeypatch):
    """Flash attention is taken where it can run, and refused where it cannot and is asked for."""
    choose = loading.choose_attention
    half = torch.bfloat16
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: True)
    assert choose("auto", torch.device("cuda"), half) == "flash_attention_2"
    assert choose("flash_attention_2", "cuda", torch.float16) == "flash_attention_2"
    assert choose("sdpa", "cuda", half) == "sdpa"
    assert choose("auto", "cuda", torch.float32) == choose("auto", "cpu", half) == "sdpa"
    with pytest.raises(UserError, match="needs a CUDA device"):
        choose("flash_attention_2", "cpu", torch.float32)
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: False)
    assert choose("auto", "cuda", half) == choose("sdpa", "cpu", torch.float32) == "sdpa"
    with pytest.raises(UserError, match="the package flash-attn"):
        choose("flash_attention_2", "cuda", half)


def test_attention_of_a_loaded_model_is_the_chosen_one(folder):
    """The model computes with the attention that was chosen."""
    assert loading.load_model(str(folder))[0].config._attn_implementation == "sdpa"
    assert (
        loading.load_model(str(folder), attention="eager")[0].config._attn_implementation == "eager"
    )


def test_a_pickle_is_never_opened(folder):
    """No code runs when weights are read: a folder with a .bin alone is refused."""
    ran = folder / "ran"

    class Bomb:
        def __reduce__(self):
            return Path.mkdir, (ran,)

    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="model.safetensors"):
        loading.load_model(str(folder))
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.load_model(str(folder))
    assert not ran.exists()


def test_weights_are_never_made_up(folder):
    """A layer that the file lacks is named; `transformers` alone would draw it at random."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack .*layers.1.mlp.down_proj"):
        loading.load_model(str(folder))


def test_another_models_tokenizer_is_refused(folder):
    """A tokenizer whose text can become an id without a row in the embedding is refused."""
    make_tokenizer(("<a>",)).save_pretrained(folder)
    with pytest.raises(UserError, match="has 102 embeddings, 103 tokens"):
        loading.load_model(str(folder))


def test_a_prompt_without_a_question_is_refused(folder):
    """A prompt without a place for the question is refused."""
    (folder / loading.PROMPT_FILE).write_text("Answer!")
    with pytest.raises(UserError, match="lacks the word {question}"):
        loading.load_prompt(str(folder))


def test_a_special_token_may_lie_beyond_the_embedding(folder):
    """Gemma 3 1B has one token more than rows, an image's. No text becomes it, so it is no reason
    to refuse the model, and it is never sampled."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    model, tokenizer = loading.load_model(str(folder))
    rows = model.get_input_embeddings().num_embeddings
    assert vocabulary_size(tokenizer) == rows + 1
    prompt = build_prompt("What is <image>?", "{question}", tokenizer)
    [ids] = prompt_ids(tokenizer, [prompt])
    assert max(ids) < rows
    [written] = generate(model, [ids], 40, vocab_size=vocabulary_size(tokenizer), eos_id=())
    assert len(written.ids) == 40 and max(written.ids) < rows


def test_a_gguf_file_that_is_none(folder):
    """A file with this ending is refused in one sentence, and so is a path to nothing."""
    (folder / "model.gguf").write_text("no tensors")
    with pytest.raises(UserError, match="model.gguf' cannot be loaded"):
        loading.check_model(str(folder / "model.gguf"))
    with pytest.raises(UserError, match="There is no model folder 'other.gguf'"):
        loading.check_model("other.gguf")
