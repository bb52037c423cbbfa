"""The weights of a model: their number format, a copy to generate with, memory in backward."""

import copy
import platform
from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

WIDE = 256  # hidden states of so many numbers make bfloat16 worth it on a CPU


def named_dtype(setting: str, device: torch.device | str, width: int = 0) -> torch.dtype:
    """The number format that a setting means: "auto" is the faster of bfloat16 and float32 for a
    model with hidden states of this width, and the other names are torch's own.

    That is bfloat16 on CUDA, and for models from `WIDE` on also on a CPU that has instructions for
    it (`benchmarks/formats.py` measures this). A width of 0 is that of a model not known here."""
    if setting != "auto":
        return getattr(torch, setting)
    kind = torch.device(device).type
    is_faster = kind == "cuda" or (kind == "cpu" and width >= WIDE and cpu_has_bfloat16())
    return torch.bfloat16 if is_faster else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 by instructions of its own."""
    if platform.machine() in ("aarch64", "arm64"):
        # PyTorch for macOS comes without this library, and without its operators then.
        has_library = torch.backends.mkldnn.is_available()
        return has_library and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        is_supported = getattr(torch.cpu, name, None)  # which some versions of PyTorch lack
        if is_supported is not None and is_supported():
            return True
    return False


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model.to(dtype)` for the weights alone. Buffers keep their format, since rotary frequencies
    in bfloat16 would misplace far tokens."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def freeze_embeddings(model: nn.Module, dtype: torch.dtype) -> None:
    """Take the token embeddings and the output head, which often are one matrix, out of what is
    learned. They are kept in `dtype`, the format that is computed in: autocast would convert such a
    weight anew for each piece of the logits, and copies of the model can share it."""
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            cast_weights(layer, dtype).requires_grad_(False)


def learned_weights(model: nn.Module) -> list[nn.Parameter]:
    """What an optimiser is given."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def frozen_weights(model: nn.Module) -> dict[int, nn.Parameter]:
    """What does not learn, by its id: given to `deepcopy`, the copy shares these weights."""
    return {id(weight): weight for weight in model.parameters() if not weight.requires_grad}


def checkpoint_layers(model: nn.Module) -> None:
    """Save memory: from now on the forward keeps each layer's input alone, and the backward
    computes the rest again. `transformers` does this in train mode only. So the layers themselves
    are put into that mode, but not what is in them: no dropout starts."""
    model.activation_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def computes_in(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all weights are of this format; those of a LoRA may be of another, which it minds."""
    named = model.named_parameters()
    return all(weight.dtype == dtype for name, weight in named if "lora_" not in name)


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in `dtype`, which does not learn. Both share the weights that are in this
    format already and do not learn in the model either: those stay equal."""
    frozen = {key: weight for key, weight in frozen_weights(model).items() if weight.dtype == dtype}
    return cast_weights(copy.deepcopy(model, frozen), dtype).requires_grad_(False)


def make_writer(
    model: nn.Module, dtype: torch.dtype, device: torch.device | str, sharded: bool = False
) -> Callable[[], nn.Module]:
    """A function that gives the model to generate with; `model` is not prepared yet.

    That is `model` itself where it is whole and in the format that is computed in. Otherwise it is
    a copy, which each call brings up to date."""
    if not sharded and computes_in(model, dtype):
        return lambda: model
    replica = frozen_copy(model, dtype).to(device)

    @torch.no_grad()
    def updated_copy() -> nn.Module:
        for copied, weight in zip(replica.parameters(), model.parameters(), strict=True):
            if copied is not weight:
                copied.copy_(weight.full_tensor() if hasattr(weight, "full_tensor") else weight)
        return replica

    return updated_copy
