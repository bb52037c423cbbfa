"""What families do differently: logits changed after the head, attention, and limits on length."""

import pytest
import torch
from conftest import EOS, VOCAB, make_model, make_tokenizer
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from minizs import UserError, sft
from minizs.generate import Decoder, generate
from minizs.logprobs import token_logprobs
from minizs.models import loading, support
from minizs.models.batches import attention, pad

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "bos_token_id": None,
}
# Settings so strong that leaving one out changes every number.
CHANGED = {
    "cap": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5, "head_dim": 8},
    ),
    "factor": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
    "divisor": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}),
}
ROWS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]


def make_changed(name: str, **settings):
    make_config, make, changes = CHANGED[name]
    torch.manual_seed(0)
    return make(make_config(**(SIZES | changes | settings))).eval()


def own_logprobs(model, row: list[int]) -> torch.Tensor:
    """The model's own log-probabilities of a row's tokens but for the first: (T - 1,)."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None]).squeeze(1)


@pytest.mark.parametrize("name", list(CHANGED))
def test_logits_changed_after_the_head(name):
    """Scoring, supervised learning and sampling use the logits that the model itself computes."""
    model = make_changed(name)
    own = [own_logprobs(model, row) for row in ROWS]
    lengths = [len(row) for row in ROWS]
    ids = pad(ROWS)
    mask = attention(lengths)
    marked = mask.clone()
    marked[:, 0] = 0
    scored = token_logprobs(model, ids, mask, marked)
    torch.testing.assert_close(scored[marked == 1], torch.cat(own))
    loss, count = sft.nll(model, ids, mask, marked)
    assert count == sum(lengths) - 2
    torch.testing.assert_close(loss, -torch.cat(own).sum())
    for prompt, result in zip(ROWS, generate(model, ROWS, 9, eos_id=()), strict=True):
        expected = own_logprobs(model, prompt + result.ids)[len(prompt) - 1 :]
        assert result.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_setting_that_the_family_does_not_use_changes_nothing():
    """A Llama's configuration may hold any name; MPT's holds a scale that its model ignores."""
    model = make_model()
    plain = token_logprobs(model, *[torch.tensor([[5, 6, 7]])] * 2, torch.tensor([[0, 1, 1]]))
    model.config.final_logit_softcapping = model.config.logits_scaling = 2.0
    changed = token_logprobs(model, *[torch.tensor([[5, 6, 7]])] * 2, torch.tensor([[0, 1, 1]]))
    assert torch.equal(plain, changed)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCAB, logit_scale=0.5)
    support.check_supported(MptForCausalLM(config).eval())


def test_a_cap_is_applied_in_float32():
    """In bfloat16 a cap would make the likeliest tokens equally likely."""
    model = make_changed("cap").bfloat16()
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = model.lm_head(hidden)
    expected = 2.0 * torch.tanh(logits.float() / 2.0)
    assert torch.equal(support.final_logits(model, hidden), expected)


def test_softcapped_attention_is_eager_also_where_the_library_would_refuse(tmp_path):
    """PyTorch's attention cannot cap scores: such a model is loaded and run with one that can."""
    tokenizer = make_tokenizer()
    model = make_changed("cap", vocab_size=len(tokenizer), sliding_window=4)
    loading.save_model(model, tokenizer, tmp_path)
    loaded, _ = loading.load_model(str(tmp_path))
    assert loaded.config._attn_implementation == "eager"
    assert generate(loaded, ROWS, 9, eos_id=()) == generate(model, ROWS, 9, eos_id=())
    assert loaded.config._attn_implementation == "eager"


def test_a_model_with_logits_of_its_own_is_refused():
    """Whatever lies between the decoder and the logits is noticed by trying it."""

    class Shifted(type(make_model())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[..., 3] += 5
            return output

    with pytest.raises(ValueError, match="Shifted is not supported: it makes its logits"):
        support.check_supported(Shifted(make_model().config).eval())


def make_longrope():
    """A Phi-3 that was trained on 32 tokens at first, and has 256 positions."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    torch.manual_seed(0)
    config = Phi3Config(
        **SIZES,
        original_max_position_embeddings=32,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    return Phi3ForCausalLM(config).eval()


def test_longrope_ends_where_its_positions_are_turned_otherwise(tmp_path):
    """Up to that length all is exact, in short rows beside long ones too; more is refused, by a
    sentence before anything starts."""
    model = make_longrope()
    tokenizer = make_tokenizer()
    assert support.row_limit(model) == 32
    prompts = [list(range(5, 5 + n)) for n in (20, 3)]
    decoder = Decoder(model, prompts, temperature=0, eos_id=())
    results = decoder.turn([0, 1], [4, 4], [0, 1])
    # The documents differ in length: the shorter one's padding stands beyond the limit.
    documents = [[5], list(range(40, 52))]
    decoder.append([0, 1], documents)
    after = decoder.turn([0, 1], [7, 7], [(0, 1), (1, 1)])
    for row in range(2):
        text = prompts[row] + results[row].ids + documents[row] + after[row].ids
        assert len(text) <= 32
        expected = own_logprobs(model, text)[-7:]
        assert after[row].logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="limit of 32 tokens"):
        decoder.turn([0], [7], [(0, 2)])

    loading.save_model(model, tokenizer, tmp_path)
    loading.check_model(str(tmp_path), 32)
    with pytest.raises(UserError, match="--max_context 33 is more than the 32 positions"):
        loading.check_model(str(tmp_path), 33)


def test_learned_positions_end_where_the_table_does():
    """Padding behind a short chunk never asks for a position that no row may have."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=24, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    decoder = Decoder(model, [list(range(5, 23)), [7, 8]], temperature=0, eos_id=())
    decoder.append([0, 1], [[9], list(range(30, 42))])
    for result in decoder.turn([0, 1], [3, 3], [0, 1]):
        assert len(result.ids) == 3
