"""Which models of `transformers` this package computes right, and how their layers attend.

Others are refused before anything starts: their numbers would be wrong without a word.
"""

from torch import nn

from minizs.models.composite import text_config

FULL, SLIDING = "full_attention", "sliding_attention"
# With these settings a family changes its logits after the head (Gemma, Cohere, ...).
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def check_supported(model: nn.Module) -> None:
    """Raise ValueError where backbone-then-head would silently differ from the model's logits."""
    config = text_config(model)
    for name in AFTER_THE_HEAD:
        value = getattr(config, name, None)
        if value not in (None, 1):
            raise ValueError(f"a model that changes its logits is not supported: {name} = {value}")


def row_limit(model: nn.Module) -> int:
    """The most tokens a row may have. Raises ValueError for layers that keep another state than
    keys and values."""
    config = text_config(model)
    others = layer_kinds(config) - {FULL, SLIDING}
    if others:
        raise ValueError(f"not supported: layers of type {sorted(others)}")
    return getattr(config, "max_position_embeddings", None) or 2**31


def layer_kinds(config) -> set[str]:
    """What the model's layers attend to: everything before a token, or a sliding window of it."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds)
    return {SLIDING if getattr(config, "sliding_window", None) else FULL}
