"""The weights of a model: their number format, a copy to generate with, memory in backward."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def named_dtype(setting: str, device: torch.device | str) -> torch.dtype:
    """The number format that a setting means: "auto" is bfloat16 on CUDA and float32 elsewhere, and
    the other names are torch's own."""
    if setting == "auto":
        setting = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return getattr(torch, setting)


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
    shared = {}
    for weight in model.parameters():
        if not weight.requires_grad and weight.dtype == dtype:
            shared[id(weight)] = weight  # what `deepcopy` takes for copied already
    return cast_weights(copy.deepcopy(model, shared), dtype).requires_grad_(False)


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
