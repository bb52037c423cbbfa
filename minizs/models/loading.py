"""Load, prepare and save models and tokenizers: any causal one of `transformers`, or a LoRA. Code
that comes with a model is never run, and weights are safetensors: nothing is unpickled."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file, is_flash_attn_2_available, logging

from minizs import UserError, brief, require
from minizs.cache import row_limit
from minizs.logprobs import check_supported
from minizs.models.lora import load_lora, lora_base, save_lora
from minizs.protocol import PROMPT

logging.disable_progress_bar()  # a model of this size is loaded before a bar is drawn

TINY_BASE = Path(__file__).parent.parent / "world" / "tiny_base"  # made by benchmarks/tiny_base.py
PROMPT_FILE = "prompt.txt"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve(name: str) -> str:
    """A folder's whole path ("tiny" is the one that this package ships), or a hub name."""
    path = TINY_BASE if name == "tiny" else Path(name)
    return str(path.absolute()) if path.exists() else name


def check_model(name: str, context: int = 0) -> None:
    """Raise UserError for a folder without a model, without a tokenizer (`transformers` would make
    one up), or without positions for a `context`. A hub name is looked up when it is loaded."""
    path = Path(resolve(name))
    if not path.exists():
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
        return require(not is_path, f"There is no model folder {name!r}; check the path.")
    limit = positions(name)
    require(
        limit is None or context <= limit,
        f"--max_context {context} is more than the {limit} positions of {name}.",
    )
    require(any(path.glob("tokenizer*.json")), f"{name!r} holds no tokenizer; save one there.")


def positions(name: str) -> int | None:
    """How many tokens a model can read, if its folder is here and says so. Raises UserError for a
    folder that holds no model."""
    path = Path(resolve(name))
    if not path.exists() or (path / "adapter_config.json").is_file():
        return None
    with readable(name):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        limit = config.get("max_position_embeddings")
        return None if limit is None else int(limit)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """What goes wrong inside is a UserError: this model cannot be loaded."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise their own kinds for every broken file
        raise UserError(f"The model {name!r} cannot be loaded: {brief(error)}") from error


def load_model(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    chat_template: str = "auto",
    attention: str = "sdpa",
):
    """(model in eval mode, tokenizer) of a folder or hub name. Raises UserError."""
    tokenizer = load_tokenizer(name, chat_template)
    folder = resolve(name)
    with readable(name):
        lora = find_adapter_config_file(folder) is not None
        base = lora_base(folder) if lora else folder
        model, found = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
        )
        missing = sorted(found["missing_keys"])[:1]  # the library makes them up at random
        require(not missing, f"The weights of {name!r} lack {missing}; save the model again.")
        rows = model.get_input_embeddings().num_embeddings
        require(len(tokenizer) <= rows, f"{name!r} has {rows} embeddings, {len(tokenizer)} tokens.")
        check_supported(model)
        row_limit(model)  # refuses layers that keep more than keys and values
        if lora:
            load_lora(model, folder)
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str, chat_template: str = "auto"):
    """A folder's or hub name's, with "none" without its chat template. Raises UserError."""
    check_model(name)
    with readable(name):
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
    if chat_template == "none":
        tokenizer.chat_template = None
    return tokenizer


def load_prompt(name: str) -> str:
    """The wording of the policy's prompt: the model folder's own, or the paper's. UserError."""
    path = Path(resolve(name), PROMPT_FILE)
    with readable(name):
        text = path.read_text(encoding="utf-8") if path.is_file() else PROMPT
    require("{question}" in text, f"{path} lacks the word {{question}}; write it where one goes.")
    return text


def save_model(model, tokenizer, folder: Path, **texts: str) -> None:
    """Write a Hugging Face folder, of the LoRA alone where the model has one, and last small text
    files: `prompt="..."` becomes `prompt.txt`."""
    if hasattr(model, "peft_config"):
        save_lora(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def choose_attention(setting: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """ "auto" is flash attention where it can run, else PyTorch's own "sdpa". Raises UserError."""
    half = dtype in (torch.bfloat16, torch.float16)
    able = half and torch.device(device).type == "cuda" and is_flash_attn_2_available()
    require(
        able or setting != "flash_attention_2",
        f"--attention {setting} needs a CUDA device, "
        "bfloat16 or float16, and the package flash-attn; use --attention auto.",
    )
    return "flash_attention_2" if able and setting != "sdpa" else "sdpa"
