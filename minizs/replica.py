"""The model that writes: the trained one itself, or a plain copy of it.

Where the weights are sharded (FSDP), generating with them would gather every layer at every token,
and ranks whose rows end at different times would wait for each other for ever. And a GPU writes
fastest in bfloat16, while the optimiser wants float32. In both cases a whole copy, in the type
that the run computes in, is brought up to date once before each phase of rollouts. What its
rounding changes is only seen in the metric `logprob_gap_max`: the ratio's log-probabilities come
from the trained model's own forward (learner.py).
"""

import copy

import torch
from torch import Tensor, nn

from minizs.models import cast_weights


def whole(tensor: Tensor) -> Tensor:
    """A parameter that may be sharded, gathered: every rank has to call this, in the same order."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Writer:
    """Call it for the model to generate with. Make it before Accelerate prepares `model`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device | str,
                 sharded: bool = False) -> None:  # fmt: skip
        self.model = self.copy = model
        if sharded or dtype != model.dtype:
            self.copy = cast_weights(copy.deepcopy(model), dtype).requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self) -> nn.Module:
        if self.copy is not self.model:
            pairs = zip(self.copy.parameters(), self.model.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.copy_(whole(theirs))
        return self.copy
