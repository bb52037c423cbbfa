"""Qwen2, Qwen3 and Llama, with what their tokenizers do: through load, rollout, score and save."""

import pytest
import torch
from conftest import EOS, make_model, make_tokenizer, with_bos
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

from minizs import protocol, sft, simulator
from minizs.logprobs import Scorer
from minizs.models import loading, weights
from minizs.models.batches import attention, pad
from minizs.rollout import Limits, Policy, rollout
from minizs.trajectory import Example, SearchRequest

# Whole actions are tokens of their own, so that a random model acts now and then.
ACTIONS = tuple(f"<search>{c}</search>" for c in "abcdefgh") + ("<answer>a</answer>",)
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTIONS = [Example(text, ("a",)) for text in ("abc", "a" * 20, "b <eos> c")]


class Documents:
    """An engine that finds the same in any search."""

    def search(self, requests):
        return [["some words"] for _ in requests]


def llama_tokenizer():
    """As an instruct Llama's: a bos before any text, and a template that names it as well."""
    tokenizer = with_bos(make_tokenizer(ACTIONS))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = CHAT
    return tokenizer


def pad_is_eos():
    """A token a byte, as Qwen's but for its merges; its end of sequence is its pad."""
    bytes_ = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(bytes_, [], eos_token="<eos>", pad_token="<eos>", unk_token="<eos>")
    tokenizer.add_tokens(list(ACTIONS))
    return tokenizer


def no_pad():
    tokenizer = pad_is_eos()
    tokenizer.pad_token = None
    return tokenizer


def chat():
    tokenizer = pad_is_eos()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = CHAT.replace("{{ bos_token }}", "")
    return tokenizer


def make_folder(path, tokenizer, family="llama", **settings):
    """A saved random model with many more embedding rows than there are tokens."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model(
        family, vocab_size=len(tokenizer) + 60, max_position_embeddings=1024, **ids, **settings
    )
    loading.save_model(model, tokenizer, path, prompt="{question}")
    return str(path)


def score(model, tokenizer, rows):
    """What training computes of these trajectories: (scored, sampled) at the policy's tokens."""
    mask = pad([row.loss_mask for row in rows])
    scorer = Scorer(model, vocab_size=len(tokenizer))
    with torch.no_grad():
        lengths = [len(row.ids) for row in rows]
        scored, _ = scorer(pad([row.ids for row in rows]), attention(lengths), mask)
    sampled = pad([row.logprobs for row in rows], dtype=torch.float32)
    return scored[mask == 1], sampled[mask == 1]


def play(model, tokenizer, **options):
    limits = Limits(turns=2, turn_tokens=25)
    policy = Policy(model, tokenizer, "{question} <eos>", limits, seed=1)
    return rollout(policy, QUESTIONS, Documents(), group_size=4)


@pytest.mark.parametrize("make", [pad_is_eos, no_pad, chat])
def test_a_family_from_load_to_save(family, make, tmp_path):
    """A model is loaded, plays, is scored and saved, whatever its pad and end tokens are. Training
    sees the same ids as the rollout, and `transformers` reads the saved policy as the same."""
    folder = make_folder(tmp_path / "base", make(), family)
    model, tokenizer = loading.load_model(folder)
    rows = play(model, tokenizer)
    assert any(turn.documents for row in rows for turn in row.turns)
    assert tokenizer.eos_token_id in rows[-1].ids[: rows[-1].loss_mask.index(1)]
    assert max(max(row.ids) for row in rows) < len(tokenizer)
    scored, sampled = score(model, tokenizer, rows)
    assert len(sampled) > 100 and (scored - sampled).abs().max() < 1e-4
    loading.save_model(model, tokenizer, tmp_path / "policy")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model(ids).logits)
    reloaded_tokenizer = loading.load_tokenizer(str(tmp_path / "policy"))
    assert protocol.prompt_ids(reloaded_tokenizer, ["a b"]) == protocol.prompt_ids(make(), ["a b"])


def test_a_chat_template_wraps_the_prompt_alone():
    """The template stands around the prompt and nothing else; there is one opening token."""
    tokenizer = llama_tokenizer()
    [ids] = protocol.prompt_ids(tokenizer, ["a "])
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<eos>", "<|user|>", "a", "<eos>", "<|assistant|>"]
    prompts = protocol.prompt_ids(tokenizer, ["a ", "bc"])
    assert prompts[0] == ids != prompts[1] and len(prompts) == 2
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=1024)
    for row in play(model, tokenizer):
        assert row.ids[:2] == ids[:2]
        starts = [t == ids[-1] and not m for t, m in zip(row.ids, row.loss_mask, strict=True)]
        assert sum(starts) == 1 and starts.index(True) == row.loss_mask.index(1) - 1


def test_without_a_chat_template_there_is_none_later(tmp_path):
    """A policy that was trained without a template is used without one."""
    folder = make_folder(tmp_path / "base", llama_tokenizer())
    model, tokenizer = loading.load_model(folder, chat_template="none")
    plain = [EOS, *tokenizer.convert_tokens_to_ids(list("a b"))]
    assert protocol.prompt_ids(tokenizer, ["a b"]) == [plain]
    loading.save_model(model, tokenizer, tmp_path / "policy")
    assert protocol.prompt_ids(loading.load_tokenizer(str(tmp_path / "policy")), ["a b"]) == [plain]
    assert protocol.prompt_ids(loading.load_tokenizer(folder), ["a b"]) != [plain]


def test_training_and_use_open_alike():
    """A training text gets its template once, around what opens it, as in use."""
    tokenizer = llama_tokenizer()
    [opening] = protocol.prompt_ids(tokenizer, ["a"])
    ids, mask = sft.encode(tokenizer, [("a", False), ("b", True), ("c", False)])
    assert ids == opening + tokenizer.convert_tokens_to_ids(["b", "c"])
    assert mask == [0] * len(opening) + [1, 0]


@pytest.mark.parametrize("make", [make_tokenizer, llama_tokenizer])
def test_a_simulator_is_used_on_what_it_was_trained_on(make, monkeypatch):
    """A simulator is asked in the format that it was trained in, and learns to end its reply."""
    tokenizer = make()
    prompts_read = []
    template = "Write {top_k} {quality} ones: {query}\n"
    request = SearchRequest("q", "who?", ("me",))
    monkeypatch.setattr(
        simulator, "generate", lambda model, prompts, *_, **__: prompts_read.extend(prompts) or []
    )
    simulator.SimulatedSearch(None, tokenizer, template, top_k=2).search([request])
    text = simulator.training_text(template, request, ["one", "two"])
    ids, mask = sft.encode(tokenizer, text, end=True)
    assert prompts_read == [ids[: mask.index(1)]]
    assert tokenizer.decode(ids[mask.index(1) :]) == "Doc 1: one\nDoc 2: two<eos>"


@pytest.mark.parametrize("width, scale", [(32, 0.1), (weights.WIDE, 0.03)])
def test_bfloat16_from_load_to_score(family, width, scale, tmp_path):
    """In bfloat16 sampler and scorer differ by no more than rounding, and log-probabilities are
    float32; so it is where "auto" chooses this format."""
    folder = make_folder(tmp_path, pad_is_eos(), family, initializer_range=scale, hidden_size=width)
    model, tokenizer = loading.load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    rows = play(model, tokenizer)
    scored, sampled = score(model, tokenizer, rows)
    assert scored.dtype == torch.float32 and (scored != scored.bfloat16().float()).any()
    gap = (scored - sampled).abs()
    assert gap.mean() < 0.02 and gap.max() < 0.2
    exact, _ = score(
        loading.load_model(folder)[0], tokenizer, rows
    )  # the same weights but for rounding
    assert (scored - exact).abs().mean() < 0.05


def test_cast_weights_leaves_the_rotary_frequencies_alone():
    """Rotary frequencies stay float32: in bfloat16 far tokens would stand at wrong places."""
    model = make_model()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert weights.cast_weights(model, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
