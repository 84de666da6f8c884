"""What GPU this is, and what Triton can do on it."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def triton_takes(x: Tensor) -> bool:
    """Whether small kernels for a rank's edges, parts and rows take `x`: on a GPU, but not in fp64."""
    return HAS_TRITON and x.is_cuda and x.dtype != torch.float64


def capability_of(device: torch.device) -> int:
    """The device's compute capability times ten; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def kernels_problem(device: str, dtype: torch.dtype, dim: int) -> str | None:
    """Why the kernels cannot run, and what would let them; None where they can."""
    if not HAS_TRITON:
        return "the package triton is not installed (torch's CUDA builds for Linux bring it)"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"they run on GPUs, not on the device {device!r} (but with TRITON_INTERPRET=1 in the environment, slowly)"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"they take bf16, fp16 and fp32, not {dtype}"
    if dim > 256:
        return f"they take head dimensions up to 256, not {dim}"
    return None
