"""Models of text and images: their language model is used as the language model that it is."""

import pytest
import torch
from conftest import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from minizs.generate import generate
from minizs.logprobs import token_logprobs
from minizs.models import loading
from minizs.models.composite import text_config

ROWS = 102  # as many as the tokenizer has tokens
TEXT = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3():
    text = TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 256}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def llava():
    text = TEXT | {"model_type": "llama"}
    vision = VISION | {"model_type": "clip_vision_model", "projection_dim": 16}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))


def qwen_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    text = TEXT | {"rope_scaling": rope}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    vision["out_hidden_size"] = 32
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


@pytest.fixture(params=[gemma3, llava, qwen_vl])
def composite(request, tmp_path):
    """A composite model of random weights, and a folder that holds it."""
    torch.manual_seed(0)
    model = request.param().eval()
    loading.save_model(model, make_tokenizer(), tmp_path)
    return model, tmp_path


@torch.no_grad()
def test_a_composite_is_used_as_its_language_model(composite, tmp_path):
    """Its log-probabilities and greedy tokens are those of the whole, given text."""
    whole, folder = composite
    model, _ = loading.load_model(str(folder))
    ids = torch.randint(5, 90, (2, 12))
    expected = whole(input_ids=ids).logits.log_softmax(-1)
    expected = expected[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    ones = torch.ones_like(ids)
    mask = ones.clone()
    mask[:, 0] = 0  # nothing precedes the first token
    torch.testing.assert_close(
        token_logprobs(model, ids, ones, mask)[:, 1:], expected, atol=1e-4, rtol=0
    )
    written = generate(model, ids.tolist(), 6, temperature=0.0, eos_id=())
    greedy = whole.generate(
        input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1
    )
    assert [row.ids for row in written] == greedy[:, 12:].tolist()


def test_its_text_configuration_is_read(composite):
    """Positions, vocabulary and layers are those of the text model, which alone learns."""
    _, folder = composite
    assert loading.positions(str(folder)) == 256
    model, _ = loading.load_model(str(folder))
    assert text_config(model).vocab_size == ROWS
    assert not any(
        weight.requires_grad for name, weight in model.named_parameters() if "vis" in name
    )
    assert all(weight.requires_grad for weight in model.get_decoder().parameters())


@torch.no_grad()
def test_what_is_saved_of_it_is_an_ordinary_folder(composite, tmp_path):
    """`transformers` loads it, and so do we, with the same logits."""
    _, folder = composite
    model, tokenizer = loading.load_model(str(folder))
    loading.save_model(model, tokenizer, tmp_path / "policy")
    ids = torch.tensor([[5, 6, 7, 8]])
    reloaded, _ = loading.load_model(str(tmp_path / "policy"))
    assert torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits)
    if model.config is text_config(model):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        torch.testing.assert_close(plain(ids).logits, model(ids).logits)
