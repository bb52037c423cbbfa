"""LoRA through `peft`: train a small addition to frozen weights (arXiv 2106.09685).

The reference of the KL is then the same model with the addition switched off, so that no second
copy is kept, and the optimiser has a hundredth of the state: a 3B model trains on one card.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


def add(model: nn.Module, rank: int, seed: int = 0) -> None:
    """Put a LoRA of this rank (alpha twice that) on linear layers, not the head; freeze the rest.
    It starts as zero, so that the model is unchanged; its other half is random, by the seed, and so
    the same in all processes. Both are float32: a bfloat16 weight would round small steps away."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import cast_adapter_dtype

    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    cast_adapter_dtype(model, "default")
    base = Path(model.name_or_path)
    if base.exists():  # the saved LoRA names it, and is loaded from anywhere
        model.peft_config["default"].base_model_name_or_path = str(base.absolute())


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model without its addition, inside."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    model.disable_adapters()  # which also freezes them: FSDP2 would prepare for no gradients
    for weight in learned:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        model.enable_adapters()


def merged(base: nn.Module, folder: Path) -> nn.Module:
    """A plain model: `base` with the addition that was saved in `folder`."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).merge_and_unload()
