"""Load and save models and tokenizers: any causal one of `transformers`, a LoRA, or a GGUF file.

Code that comes with a model is never run, and weights are safetensors or GGUF: nothing is
unpickled."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import find_adapter_config_file, is_flash_attn_2_available, logging

from minizs import UserError, brief, require
from minizs.models.chat import day_in_words, fix_day
from minizs.models.composite import load_language_model
from minizs.models.gguf import read_once
from minizs.models.lora import load_lora, lora_base, save_lora
from minizs.models.support import check_supported, plain_attention, position_limit, row_limit
from minizs.protocol import PROBE, PROMPT, chat_texts

logging.disable_progress_bar()  # a model of this size is loaded before a bar is drawn

TINY_BASE = Path(__file__).parent.parent / "world" / "tiny_base"  # made by benchmarks/tiny_base.py
PROMPT_FILE = "prompt.txt"
GGUF = ".gguf"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve(name: str) -> str:
    """The whole path of a folder or GGUF file ("tiny" is the folder that this package ships), or a
    name on the Hugging Face hub as it is."""
    path = TINY_BASE if name == "tiny" else Path(name)
    return str(path.absolute()) if path.exists() else name


def location(name: str) -> tuple[str, str | None]:
    """Where `transformers` finds a model: a folder or hub name, and the name of the GGUF file in
    the folder if it is one."""
    path = Path(resolve(name))
    if path.suffix == GGUF and path.is_file():
        return str(path.parent), path.name
    return resolve(name), None


def check_model(name: str, context: int = 0) -> None:
    """Raise UserError for a folder without a model or a tokenizer (`transformers` would make one
    up), or for a model with fewer positions than `context`. A hub name is not looked up here."""
    path = Path(resolve(name))
    if not path.exists():
        is_path = name.startswith((".", "/", "~")) or name.endswith(GGUF)
        is_path = is_path or name.count("/") > 1 or "\\" in name
        require(not is_path, f"There is no model folder {name!r}; check the path.")
        return
    limit = positions(name)
    require(
        limit is None or context <= limit,
        f"--max_context {context} is more than the {limit} positions of {name}; lower it.",
    )
    has_tokenizer = path.is_file() or any(path.glob("tokenizer*.json"))
    require(has_tokenizer, f"{name!r} holds no tokenizer; save one there.")


def positions(name: str) -> int | None:
    """How many tokens a model can read, if it is here and its configuration says so. Raises
    UserError for a folder that holds no model."""
    path = Path(resolve(name))
    if not path.exists() or (path / "adapter_config.json").is_file():
        return None
    is_gguf = path.is_file() and path.suffix == GGUF
    require(
        is_gguf or (path / "config.json").is_file(),
        f"{name!r} holds no model: it is neither a folder with a config.json nor a {GGUF} file; "
        "check the path.",
    )
    with readable(name):
        config = read_once(AutoConfig, *location(name))
    return position_limit(config.get_text_config(decoder=True))


def width(name: str) -> int:
    """How many numbers a hidden state of a model has. It is 0 where that cannot be read: whoever
    loads the model says why."""
    try:
        folder, file = location(name)
        if file is None and find_adapter_config_file(folder) is not None:
            folder, file = location(lora_base(folder))
        config = read_once(AutoConfig, folder, file)
        return config.get_text_config(decoder=True).hidden_size
    except Exception:  # the libraries raise their own kinds for every broken file
        return 0


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
    chat_template_args: dict | None = None,
    day: date | None = None,
    attention: str = "sdpa",
):
    """(model in eval mode, tokenizer) of a folder, a GGUF file or a hub name. Raises UserError."""
    tokenizer = load_tokenizer(name, chat_template, chat_template_args, day)
    folder, file = location(name)
    with readable(name):
        is_lora = file is None and find_adapter_config_file(folder) is not None
        base = lora_base(folder) if is_lora else folder
        # Unless told otherwise the library takes "sdpa", or "eager" for a family that needs that.
        options = {} if attention == "sdpa" else {"attn_implementation": attention}
        model, missing = load_language_model(base, file, dtype=dtype, **options)
        if attention == "sdpa":
            model.set_attn_implementation(plain_attention(model))
        # The library would make these up at random.
        require(not missing, f"The weights of {name!r} lack {missing[:1]}; save the model again.")
        check_vocabulary(name, tokenizer, model.get_input_embeddings().num_embeddings)
        row_limit(model)  # refuses layers that keep more than keys and values
        check_supported(model)
        if is_lora:
            load_lora(model, folder)
    return model.to(device).eval(), tokenizer


def check_vocabulary(name: str, tokenizer, rows: int) -> None:
    """Raise UserError if text can become an id that has no row in the embedding.

    Special tokens may lie beyond the rows, as the one for an image does in Gemma 3 1B: data never
    becomes one (see `protocol.neutralize`), and the model cannot write one."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= rows]
    of_text = sorted(set(beyond) - special)
    require(
        not of_text,
        f"{name!r} has {rows} embeddings, {len(tokenizer)} tokens: none for {of_text[:1]}. Its "
        "tokenizer belongs to another model.",
    )


def load_tokenizer(
    name: str,
    chat_template: str = "auto",
    chat_template_args: dict | None = None,
    day: date | None = None,
):
    """The tokenizer of a folder, a GGUF file or a hub name.

    With `chat_template` "none" it has no chat template. Its attribute `chat_template_args` holds
    what is passed to `apply_chat_template` wherever that is called: these arguments, and what makes
    the template print this day, not today. Raises UserError."""
    check_model(name)
    with readable(name):
        tokenizer = read_once(AutoTokenizer, *location(name))
        if chat_template == "none":
            tokenizer.chat_template = None
        options = dict(chat_template_args or {})
        if day and tokenizer.chat_template:
            options.setdefault("date_string", day_in_words(day))
            template = options.get("chat_template") or tokenizer.get_chat_template()
            options["chat_template"] = fix_day(template, day)
    tokenizer.chat_template_args = options
    check_template(name, tokenizer)
    return tokenizer


def check_template(name: str, tokenizer) -> None:
    """Raise UserError for a chat template that takes no question, or none with these arguments."""
    if not tokenizer.chat_template:
        return
    advice = "mend --chat_template_args, or give --chat_template none"
    try:
        [text] = chat_texts(
            tokenizer, [[{"role": "user", "content": PROBE}]], add_generation_prompt=True
        )
    except Exception as error:  # a template is a program
        raise UserError(
            f"The chat template of {name!r} takes no question ({brief(error)}); {advice}."
        ) from error
    require(
        PROBE in text.lower(),
        f"The chat template of {name!r} leaves the question out; {advice}.",
    )


def load_prompt(name: str) -> str:
    """The wording of the policy's prompt: the model folder's own, or the paper's. UserError."""
    path = Path(resolve(name), PROMPT_FILE)
    with readable(name):
        text = path.read_text(encoding="utf-8") if path.is_file() else PROMPT
    require("{question}" in text, f"{path} lacks the word {{question}}; write it where one goes.")
    return text


def save_model(model, tokenizer, folder: Path, **texts: str) -> None:
    """Write a Hugging Face folder, with the LoRA alone where the model has one, and then small text
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
    is_half = dtype in (torch.bfloat16, torch.float16)
    is_cuda = torch.device(device).type == "cuda"
    can_run = is_half and is_cuda and is_flash_attn_2_available()
    require(
        can_run or setting != "flash_attention_2",
        f"--attention {setting} needs a CUDA device, "
        "bfloat16 or float16, and the package flash-attn; use --attention auto.",
    )
    return "flash_attention_2" if can_run and setting != "sdpa" else "sdpa"
