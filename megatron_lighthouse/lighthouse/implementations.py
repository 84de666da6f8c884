"""Which implementation of the steps runs where: the kernels, or plain PyTorch."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from megatron_lighthouse.gpu import HAS_TRITON
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.packed import reference as packed_reference
from megatron_lighthouse.lighthouse.packed.steps import PackedSteps
from megatron_lighthouse.lighthouse.steps import Steps
from megatron_lighthouse.notice import say_once

MOST_POOLING = 16


def steps_for(name: str, query: Tensor, pooling: int = 2) -> Steps:
    """The implementation of the steps that `name` stands for, on `query`'s device and dtype.

    Args:
        name: 'kernels', 'reference', or 'auto': the kernels on a GPU where they can run, else plain PyTorch, said once.
        pooling: p. Above 16 the kernels run, slowly: said once.

    Raises:
        ValueError: 'kernels' where they cannot run.
    """
    if name == "reference" or (name == "auto" and query.device.type != "cuda"):
        return reference
    problem = missing(query.device.type, query.dtype, query.shape[-1])
    if problem is None:
        from megatron_lighthouse.kernels import lighthouse as kernels

        if pooling > MOST_POOLING:
            say_once(
                f"lighthouse: the kernels are made for a pooling of 2 to {MOST_POOLING}: at {pooling} they run out of "
                "registers, and are slow."
            )
        return kernels
    if name == "kernels":
        raise ValueError(f"config.steps kernels cannot run: {problem}. Use auto or reference.")
    say_once(f"lighthouse: the steps run in plain PyTorch, many times slower than the kernels: {problem}.")
    return reference


def packed_steps_for(name: str, query: Tensor, pooling: int = 2) -> PackedSteps:
    """As `steps_for`, over packed documents."""
    if steps_for(name, query, pooling) is reference:
        return packed_reference
    from megatron_lighthouse.kernels.lighthouse import packed as packed_kernels

    return packed_kernels


def missing(device: str, dtype: torch.dtype, dim: int) -> str | None:
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
