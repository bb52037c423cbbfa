"""Which floating-point types a device has."""

import torch

WITHOUT_FLOAT64 = {"mps"}  # device types: Apple's GPUs


def widest_float(device: torch.device) -> torch.dtype:
    """The type to add many numbers up in: float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
