"""GGUF: a model in one file, quantised, as llama.cpp reads it. `transformers` dequantises it."""

import copy
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel


def read_once(kind: type, folder: str, gguf_file: str | None = None):
    """`kind.from_pretrained` for a configuration or a tokenizer. What is in a GGUF file, where that
    takes seconds, is read once and copied from then on."""
    if gguf_file is None:
        return kind.from_pretrained(folder, trust_remote_code=False)
    changed = Path(folder, gguf_file).stat().st_mtime_ns
    return copy.deepcopy(_read(kind, folder, gguf_file, changed))


@cache
def _read(kind: type, folder: str, gguf_file: str, changed: int):
    return kind.from_pretrained(folder, gguf_file=gguf_file)


def forget_quantisation(model: PreTrainedModel) -> None:
    """Make an ordinary model of one that was loaded from a GGUF file. Its weights are ordinary
    ones, but `transformers` marks it as quantised, and refuses to save such a model."""
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None)
