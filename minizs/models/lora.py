"""LoRA (arXiv 2106.09685): put it on a model, switch it off, save it, load it, merge it.

`peft` does all of this by itself here. The methods of `transformers` for the same purpose
(`add_adapter` and its relatives) refuse some versions of `peft` that work."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import (
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from safetensors.torch import load_file, save_file
from torch import nn

from minizs import require

NAME = "default"  # what `peft` calls the only adapter of a model
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of each weight's name in that file


def add_lora(model: nn.Module, rank: int, seed: int = 0) -> None:
    """Put a LoRA (alpha twice the rank) on all linear layers but the head, and freeze the rest.

    It changes nothing yet. It is float32 in every model: bfloat16 would round small steps away."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    config.base_model_name_or_path = model.name_or_path
    LoraModel(model, config, NAME)
    cast_adapter_dtype(model, NAME)


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """The model without its LoRA, inside: the reference of the KL, and no second copy."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    for weight in learned:  # that has frozen them, too: FSDP2 would prepare for no gradients
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_lora(model: nn.Module, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which `peft` and others read."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, weight in get_peft_model_state_dict(model).items():
        weights[PREFIX + name] = weight.detach().cpu().contiguous()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[NAME].save_pretrained(folder)


def lora_base(name: str) -> str:
    """The base model that a LoRA, in a folder or at a hub name, belongs to. Raises UserError."""
    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    require(
        bool(base),
        f"{name} is a LoRA that names no base model; write the folder or the hub name of one as "
        "base_model_name_or_path into its adapter_config.json.",
    )
    return base


def load_lora(model: nn.Module, name: str) -> LoraModel:
    """Put a saved LoRA, of a folder or a hub name, on its base model. Returns `peft`'s view of it.

    Raises UserError for another kind of adapter, for one without safetensors, and for weights that
    are missing or that the model has no place for: `peft` alone would only warn of these."""
    config = PeftConfig.from_pretrained(name)
    kind = config.peft_type
    require(kind == PeftType.LORA, f"{name} is an adapter of kind {kind}; only a LoRA is read.")
    path = Path(name, WEIGHTS)
    if not Path(name).is_dir():
        path = Path(hf_hub_download(name, WEIGHTS))
    require(path.is_file(), f"{name} holds no {WEIGHTS}; save the LoRA as safetensors.")
    weights = {key.removeprefix(PREFIX): weight for key, weight in load_file(path).items()}

    config.inference_mode = True
    view = LoraModel(model, config, NAME)
    cast_adapter_dtype(model, NAME)
    set_peft_model_state_dict(model, weights)
    wrong = sorted(get_peft_model_state_dict(model).keys() ^ weights.keys())
    require(not wrong, f"The LoRA {name} lacks {wrong[:1]}, or its base has no place for it.")
    return view


def merge_lora(base: nn.Module, folder: Path) -> nn.Module:
    """A plain model: `base` with the LoRA that was saved in `folder`."""
    return load_lora(base, str(folder)).merge_and_unload()
