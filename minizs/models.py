"""Load and save models and their tokenizers, with one clear sentence when something is missing.

Any `transformers` causal language model with a tokenizer serves as policy or simulator. Code that
comes with a model is never executed.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from minizs.config import UserError, require
from minizs.logprobs import check_supported
from minizs.protocol import PROMPT

logging.disable_progress_bar()  # a model of this size is loaded before a bar is drawn

TINY_BASE = Path(__file__).parent / "tiny_base"  # made by `python -m minizs.pretrain`
PROMPT_FILE = "prompt.txt"


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
    require((path / "config.json").is_file(), f"{name!r} holds no config.json, so it is no model "
            "folder; check the path.")  # fmt: skip
    require(any(path.glob("*.safetensors")), f"{name} holds no *.safetensors weights; save the "
            "model there again.")  # fmt: skip
    tokenizers = [path / "tokenizer.json", path / "tokenizer_config.json"]
    require(any(file.is_file() for file in tokenizers), f"{name} holds a model, but no tokenizer; "
            "save one there, too.")  # fmt: skip


def check_positions(name: str, context: int) -> None:
    """Raise UserError if a local model has no positions for a context of this many tokens."""
    path = Path(resolve(name)) / "config.json"
    if path.is_file():
        try:
            limit = json.loads(path.read_text()).get("max_position_embeddings")
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}; save the model there again.") from error
        require(limit is None or context <= limit, f"--max_context {context} is more than the "
                f"{limit} positions of {name}; lower it.")  # fmt: skip


def load(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
    """(model, tokenizer) of a folder or hub name, the model in eval mode. Raises UserError."""
    tokenizer = load_tokenizer(name)
    with _readable(name):
        model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype,
                                                     use_safetensors=True)  # fmt: skip
        check_supported(model)
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str):
    """The tokenizer of a folder or hub name. Raises UserError."""
    check_model(name)
    with _readable(name):
        return AutoTokenizer.from_pretrained(resolve(name))


@contextmanager
def _readable(name: str):
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"The model {name!r} cannot be loaded: {reason}") from error


def load_prompt(name: str) -> str:
    """The wording of the policy's prompt: the model folder's own, or the paper's."""
    path = Path(resolve(name)) / PROMPT_FILE
    return path.read_text() if path.is_file() else PROMPT


def save(model, tokenizer, folder: Path, **texts: str) -> None:
    """A Hugging Face folder, and last small text files (`prompt="..."` becomes `prompt.txt`)."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
