"""Small things that many tests share: tiny random models, a character tokenizer, a scripted head.

No test downloads anything; all models are random, seeded, and of two layers.
"""

import string

import pytest
import torch
from counts import COUNTS
from scripts import bad, collected, home, work  # noqa: F401 (fixtures)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
EOS, VOCAB = 1, 97


def make_model(family: str = "llama", dtype=torch.float32, seed: int = 0, **config):
    """A random causal LM of 2 layers x 32 with grouped keys; weights large enough to matter."""
    make_config, make = FAMILIES[family]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "pad_token_id": EOS,
    }
    torch.manual_seed(seed)
    return make(make_config(**(settings | config))).to(dtype).eval()


def make_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A token a printable character, and `extra` tokens that text is never split into by itself.

    Decoding joins the tokens' texts. Ids 0 and 1 are "<pad>" and "<eos>".
    """
    tokens = ["<pad>", "<eos>", *string.printable, *extra]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="?"
    )


def with_bos(tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer, from now on opening each text with "<eos>", as Llama's does with its BOS."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", EOS)]
    )
    return tokenizer


class ScriptedHead(nn.Module):
    """In place of `lm_head`: at the k-th call, all rows get the k-th token of the script."""

    def __init__(self, script: list[int], vocab_size: int) -> None:
        super().__init__()
        self.script = iter(script)
        self.vocab_size = vocab_size

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.vocab_size)
        logits[..., next(self.script)] = 100.0
        return logits


def pytest_terminal_summary(terminalreporter) -> None:
    """What was tried, in numbers."""
    for name, count in sorted(COUNTS.items()):
        terminalreporter.write_line(f"{name}: {count}")


@pytest.fixture(params=list(FAMILIES))
def family(request) -> str:
    """The test runs once a model family."""
    return request.param
