"""Which implementation of Parallax runs where: the kernels, or plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Block
from megatron_lighthouse.gpu import kernels_problem
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.parallax.blocks import Kernels, Plain


def implementation_for(
    name: str, device: torch.device, dtype: torch.dtype, dim: int, problem: str | None = None
) -> type[Kernels | Plain]:
    """What `name` of --parallax-kernels stands for.

    Args:
        problem: why the kernels cannot do what is asked, whatever the device.

    Raises:
        ValueError: 'triton' where the kernels cannot run.
    """
    if name == "reference" or (name == "auto" and device.type != "cuda"):
        return Plain
    problem = problem or kernels_problem(device.type, dtype, dim)
    if problem is None:
        return Kernels
    if name == "triton":
        raise ValueError(f"--parallax-kernels triton cannot run: {problem}. Use auto or reference.")
    say_once(f"parallax: attention runs in plain PyTorch, many times slower than the kernels: {problem}.")
    return Plain


def block_for(
    name: str, query: Tensor, scale: float, window: int | None, cu_seqlens: Tensor | None, over_parts: bool = False
) -> Block:
    """The block for inputs like `query`.

    Args:
        over_parts: whether it attends to parts of the sequence, not to all of it at once.

    Raises:
        ValueError: as `implementation_for`.
    """
    problem = None
    if window is not None and over_parts:
        problem = "they know a window within whole sequences alone: use cp_comm_type a2a"
    kind = implementation_for(name, query.device, query.dtype, query.shape[-1], problem)
    return kind(scale, window, cu_seqlens)
