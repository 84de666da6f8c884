"""What GPU this is, and what can be left to Triton on it."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def triton_takes(x: Tensor) -> bool:
    """Whether what is said of a rank's edges and parts is done by Triton on `x`: on a GPU, but not in fp64."""
    return HAS_TRITON and x.is_cuda and x.dtype != torch.float64


def capability_of(device: torch.device) -> int:
    """The device's compute capability times ten; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
