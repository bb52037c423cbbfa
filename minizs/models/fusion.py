"""One kernel in place of many small ones, by `torch.compile`: on a GPU, and for large models alone.

Norms, MLPs, rotary positions and the softmax over a vocabulary are a dozen small kernels each, and
each of these reads and writes all of its input. Compiled they are one or two. The first use takes
some ten seconds, which a small model never earns back. Where there is no compiler all goes on
without. `TORCH_COMPILE_DISABLE=1` in the environment switches it off. A reader can skip this file.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

OPTIONS = {"emulate_precision_casts": True}
LARGE = 10**8  # weights; a smaller model is not worth the wait
PIECES = ("RMSNorm", "MLP")  # how the names of their classes end
ROTARY = "apply_rotary_pos_emb"  # a function beside the model's class


def is_worth_it(model: nn.Module) -> bool:
    """Whether compiled pieces will save more time than compiling takes."""
    on_gpu = model.device.type == "cuda"
    return on_gpu and sum(weight.numel() for weight in model.parameters()) >= LARGE


@cache
def compiled(function: Callable) -> Callable:
    """The function, compiled once for inputs of any number of rows; or as it is, with a warning,
    where that fails. Its numbers are rounded where those of the plain function are."""
    fast = torch.compile(function, dynamic=True, options=OPTIONS)
    choice = None  # `fast` or `function`: unknown until the first call has shown which one works

    @wraps(function)
    def call(*args, **kwargs):
        nonlocal choice
        if choice is not None:
            return choice(*args, **kwargs)
        try:
            result = fast(*args, **kwargs)
            choice = fast
            return result
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler, or for the lack of one
            reason = f"{type(error).__name__}: {error}"[:300]
            warnings.warn(f"{function.__qualname__} is not compiled: {reason}", stacklevel=2)
            choice = function
            return function(*args, **kwargs)

    return call


@contextmanager
def compiled_pieces(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's norms, MLPs and rotary positions are compiled ones."""
    modeling = sys.modules[type(model).__module__]
    plain = {}
    if hasattr(modeling, ROTARY):
        plain[modeling, ROTARY] = getattr(modeling, ROTARY)
    for kind in {type(module) for module in model.modules()}:
        if kind.__name__.endswith(PIECES):
            plain[kind, "forward"] = kind.forward
    try:
        for (owner, name), function in plain.items():
            setattr(owner, name, compiled(function))
        yield
    finally:
        for (owner, name), function in plain.items():
            setattr(owner, name, function)


def compile_modules(model: nn.Module, whole_layers: bool = False) -> None:
    """From now on the model's norms and MLPs, or its whole layers, are compiled ones.

    They stay so, for learning: the backward pass may compute a layer once more."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) if whole_layers else is_piece(module):
            module.compile(dynamic=True)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside the block no module of the model is a compiled one. Layers that are compiled for
    learning would be compiled anew for every shape of a cache."""
    compiled_calls = {}
    for module in model.modules():
        if module._compiled_call_impl is not None:
            compiled_calls[module] = module._compiled_call_impl
            module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled_calls.items():
            module._compiled_call_impl = call


def is_piece(module: nn.Module) -> bool:
    """Whether it is a norm of many small kernels, or an MLP."""
    return type(module).__name__.endswith(PIECES)
