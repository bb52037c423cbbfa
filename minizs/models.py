"""Load and save models and their tokenizers, with one clear sentence when something is missing.

Any `transformers` causal language model with a tokenizer serves as policy or simulator. Code that
comes with a model is never executed, and weights are safetensors: nothing is unpickled.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available, logging

from minizs.cache import row_limit
from minizs.config import UserError, brief, require
from minizs.logprobs import check_supported
from minizs.protocol import PROMPT

logging.disable_progress_bar()  # a model of this size is loaded before a bar is drawn

TINY_BASE = Path(__file__).parent / "tiny_base"  # made by benchmarks/tiny_base.py
PROMPT_FILE = "prompt.txt"
# What a model folder holds, and the files that it is in: of a whole model, or of a LoRA.
NEEDED = {"config.json": ("config.json", "adapter_config.json"), "tokenizer": ("tokenizer*.json",),
          "*.safetensors weights": ("*.safetensors",)}  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve(name: str) -> str:
    """ "tiny" is the base model that this package ships; all else is a folder or a hub name."""
    return str(TINY_BASE) if name == "tiny" else name


def check_model(name: str) -> None:
    """Raise UserError if a folder is named that holds no model or no tokenizer."""
    path = Path(resolve(name))
    if not path.exists():  # then a hub name, looked up when it is loaded
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
        return require(not is_path, f"There is no model folder {name!r}; check the path.")
    for what, patterns in NEEDED.items():
        there = any(file.is_file() for pattern in patterns for file in path.glob(pattern))
        require(there, f"{name!r} is no model folder: it holds no {what}; save it there again.")


def check_positions(name: str, context: int) -> None:
    """Raise UserError if a local model has no positions for a context of this many tokens."""
    path = Path(resolve(name)) / "config.json"
    with readable(name):
        config = json.loads(path.read_text()) if path.is_file() else {}
        limit = config.get("max_position_embeddings", context)
        require(context <= limit, f"--max_context {context} is more than the {limit} positions of "
                f"{name}; lower it.")  # fmt: skip


def load(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *,
         revision: str | None = None, chat_template: str = "auto",
         attention: str = "sdpa"):  # fmt: skip
    """(model, tokenizer) of a folder or hub name (its branch, tag or commit: `revision`), the model
    in eval mode. `attention` is `choose_attention`'s. Raises UserError."""
    tokenizer = load_tokenizer(name, chat_template, revision)
    with readable(name):
        model, found = AutoModelForCausalLM.from_pretrained(
            resolve(name), dtype=dtype, use_safetensors=True, attn_implementation=attention,
            revision=revision or "main", trust_remote_code=False,
            output_loading_info=True)  # fmt: skip
        missing = sorted(found["missing_keys"])  # the library makes them up at random
        require(not missing, f"The weights of {name!r} lack {missing[:1]}; save the model again.")
        rows = model.get_input_embeddings().num_embeddings
        require(len(tokenizer) <= rows, f"The tokenizer of {name!r} has {len(tokenizer)} tokens, "
                f"its model {rows}; save the one that it was trained with.")  # fmt: skip
        check_supported(model)
        row_limit(model)  # refuses layers that keep more than keys and values
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str, chat_template: str = "auto", revision: str | None = None):
    """The tokenizer of a folder or hub name, with "none" without its chat template: what is trained
    and saved without one is used without one later. Raises UserError."""
    check_model(name)
    with readable(name):
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), revision=revision or "main",
                                                  trust_remote_code=False)  # fmt: skip
    if chat_template == "none":
        tokenizer.chat_template = None
    return tokenizer


def load_prompt(name: str) -> str:
    """The wording of the policy's prompt: the model folder's own, or the paper's. UserError."""
    path = Path(resolve(name)) / PROMPT_FILE
    with readable(name):
        text = path.read_text(encoding="utf-8") if path.is_file() else PROMPT
    require("{question}" in text, f"{path} lacks the word {{question}}; write it where one goes.")
    return text


@contextmanager
def readable(name: str) -> Iterator[None]:
    """What goes wrong inside is a UserError: this model cannot be loaded."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise their own kinds for every broken file
        raise UserError(f"The model {name!r} cannot be loaded: {brief(error)}") from error


def save(model, tokenizer, folder: Path, **texts: str) -> None:
    """A Hugging Face folder, and last small text files (`prompt="..."` becomes `prompt.txt`)."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def compute_dtype(setting: str, device: torch.device | str) -> torch.dtype:
    """What "auto" means: bfloat16 on CUDA, float32 elsewhere; the other names are torch's own."""
    auto = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return getattr(torch, auto if setting == "auto" else setting)


def choose_attention(setting: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """What "auto" means: "flash_attention_2" where it can run, else PyTorch's own "sdpa". Raises
    UserError, which says what is missing, where flash attention is asked for and cannot run."""
    needs = {"a CUDA device": torch.device(device).type == "cuda",
             "bfloat16 or float16": dtype in (torch.bfloat16, torch.float16),
             "the flash-attn package": is_flash_attn_2_available()}  # fmt: skip
    missing = " and ".join(need for need, there in needs.items() if not there)
    if setting == "auto":
        return "sdpa" if missing else "flash_attention_2"
    require(setting == "sdpa" or not missing, f"--attention {setting} lacks {missing}; "
            "use --attention auto.")  # fmt: skip
    return setting


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)` for weights alone: rotary frequencies in bfloat16 misplace far tokens."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def checkpoint_layers(model: nn.Module) -> None:
    """From now on the forward keeps each layer's input alone; backward computes the rest anew.

    `transformers` does so for layers in train mode. They alone are put into it, not what is inside
    them, so that no dropout comes between old and new log-probabilities."""
    model.activation_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
