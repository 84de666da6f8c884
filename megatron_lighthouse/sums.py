"""The dtype of sums, and sums whose order neither the device nor shapes nor ranks decide: all come to the same bits."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which numbers like `x` are summed: fp32, and fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def one_by_one(x: Tensor, dim: int) -> Tensor:
    """The sum along `dim`, one after the other, in the dtype of sums."""
    first, *others = x.unbind(dim)
    total = first.to(accumulation_dtype(x))
    for other in others:
        total = total + other
    return total


def by_neighbours(x: Tensor, dim: int) -> Tensor:
    """The sum along `dim` of `x`, which is in a dtype of sums: neighbours first, then neighbours of those, as kernels sum."""
    x = x.movedim(dim, -1)
    x = torch.nn.functional.pad(x, (0, next_power_of_two(x.shape[-1]) - x.shape[-1]))
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x.squeeze(-1)


def next_power_of_two(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()
