"""What the families of `transformers` do differently: logits changed after the head, attention that
PyTorch's own kernel does not compute, layers that see a window, and limits on a row's length.

Models that this package would compute wrongly are refused before anything starts: their numbers
would be wrong without a word."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor, nn

from minizs import brief
from minizs.models.composite import text_config

FULL = "full_attention"
SLIDING = "sliding_attention"
# Families that are computed wrongly in rows longer than those that `check_decoding` tries.
REFUSED = {
    "dory": "with a cache it computes other numbers than without one",
    "gpt_neo": "its local layers would see more than their window",
    "moshi": "its window is used by some kinds of attention and not by others",
}
# A family that multiplies by a setting by which others divide, and one that does not use its own.
MULTIPLIED = ("hyperclovax", "logits_scaling")
UNUSED = ("mpt", "logit_scale")
# Settings that need an attention which adds to the scores, or caps them, in its own way.
OWN_ATTENTION = ("attn_logit_softcapping",)


def final_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The model's logits (..., V) after hidden states (..., d): its head's, changed as its family
    does. They are changed in float32 at least, for a cap flattens what bfloat16 tells apart."""
    logits = model.get_output_embeddings()(hidden)
    config = text_config(model)
    scale = logit_scale(config)
    cap = family_setting(config, "final_logit_softcapping")
    if scale == 1 and not cap:
        return logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1:
        logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


def logit_scale(config) -> float:
    """By what a family multiplies its logits: Cohere and Falcon-H1 by a setting of their own,
    Granite, MiniCPM and Inkling by its inverse."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= family_setting(config, name) or 1.0
    for name in ("logits_scaling", "logits_mup_width_multiplier"):
        value = family_setting(config, name) or 1.0
        is_factor = (config.model_type, name) == MULTIPLIED
        scale = scale * value if is_factor else scale / value
    return scale


def family_setting(config, name: str) -> float | None:
    """The value of a setting that the model's family knows. (Any configuration can hold any name:
    what the family does not know it does not use.)"""
    kind = type(config)
    is_known = hasattr(kind, name) or name in signature(kind.__init__).parameters
    is_used = is_known and (config.model_type, name) != UNUSED
    return getattr(config, name, None) if is_used else None


@torch.inference_mode()
def check_supported(model: nn.Module) -> None:
    """Raise ValueError for a model whose own logits are not `final_logits` of its decoder's states:
    it is run once, on three tokens."""
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    name = type(model).__name__
    if decoder is None or decoder is model or head is None:
        raise ValueError(f"{name} is not supported: it is not a decoder with a head behind it")
    states = []
    hook = decoder.register_forward_hook(
        lambda module, inputs, output: states.append(getattr(output, "last_hidden_state", None))
    )
    try:
        ids = torch.tensor([[1, 2, 3]], device=model.device)
        with attending(model, plain_attention(model)):
            expected = model(input_ids=ids, use_cache=False).logits.float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family needs besides text
        reason = brief(error)
        raise ValueError(
            f"{name} is not supported: it does not run on text alone: {reason}"
        ) from error
    finally:
        hook.remove()
    logits = None
    if len(states) == 1 and states[0] is not None:
        logits = final_logits(model, states[0]).float()
    if (
        logits is None
        or logits.shape != expected.shape
        or not torch.allclose(logits, expected, 0.02, 0.02)
    ):
        raise ValueError(f"{name} is not supported: it makes its logits in a way of its own")


def plain_attention(model: nn.Module) -> str:
    """The attention that computes this model with a mask: "sdpa" where PyTorch's own can, else
    "eager" (sinks, or softcapped scores)."""
    config = text_config(model)
    decoder = model.get_decoder()
    needs_own = any(getattr(config, name, None) for name in OWN_ATTENTION)
    return "sdpa" if getattr(decoder, "_supports_sdpa", False) and not needs_own else "eager"


@contextmanager
def attending(model: nn.Module, attention: str) -> Iterator[None]:
    """Inside the block the model computes with this kind of attention."""
    config = text_config(model)
    previous = config._attn_implementation
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = previous


def row_limit(model: nn.Module) -> int:
    """The most tokens a row may have. Raises ValueError for layers that keep another state than
    keys and values."""
    config = text_config(model)
    if config.model_type in REFUSED:
        reason = REFUSED[config.model_type]
        raise ValueError(f"{type(model).__name__} is not supported: {reason}")
    others = layer_kinds(config) - {FULL, SLIDING}
    if others:
        raise ValueError(
            f"{type(model).__name__} is not supported: its layers of type "
            f"{' and '.join(sorted(others))} need another memory than keys and values"
        )
    return position_limit(config) or 2**31


def position_limit(config) -> int | None:
    """How many positions a model has, or None where its configuration does not say.

    Of a model with "longrope" only as many as it was trained on at first: in longer rows all
    positions are turned otherwise, those too whose keys are in the cache already."""
    limits = [getattr(config, "max_position_embeddings", None)]
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "rope_type" in ropes or "type" in ropes:
        ropes = {"all layers": ropes}  # others have one for each kind of layer
    for rope in ropes.values():
        kind = isinstance(rope, dict) and (rope.get("rope_type") or rope.get("type"))
        if kind == "longrope":
            limits.append(
                getattr(config, "original_max_position_embeddings", None)
                or rope.get("original_max_position_embeddings")
            )
    return min(filter(None, limits), default=None)


def layer_kinds(config) -> set[str]:
    """What the model's layers attend to: everything before a token, or a sliding window of it."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds)
    return {SLIDING if getattr(config, "sliding_window", None) else FULL}
