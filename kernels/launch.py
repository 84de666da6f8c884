"""How the kernels are launched: one small table, the same on every rank, and nothing tuned at run time.

What counts is that a thread moves 16 bytes at a time and has several loads under way; beyond that the shape of a block hardly
matters (tried on an H100 from 1 to 32 KB and 1 to 8 warps). So one line a step, for rows of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


class Launch(NamedTuple):
    """One launch configuration."""

    rows: int
    """Rows of D elements that one program holds at a time; a power of two."""
    warps: int


# bytes that one program holds at a time, and its warps
_BYTES = {"score": (16384, 4), "collect": (2048, 2), "spread": (4096, 4)}


def launch(step_name: str, dim: int, itemsize: int) -> Launch:
    """The launch of `step_name` (score, collect, spread) for rows of `dim` elements of `itemsize` bytes."""
    size, warps = _BYTES[step_name]
    return Launch(max(4, min(128, size // (padded(dim) * itemsize))), warps)


def padded(n: int) -> int:
    """The power of two that a kernel's block holds `n` elements in: at least 16."""
    return max(16, triton.next_power_of_2(n))


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the one that holds `x`."""
    here = x.device.type != "cuda" or x.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(x.device)


def launch_windows(
    kernel: Any,
    tensors: Sequence[Tensor],
    places: Tensor,
    sizes: Sequence[int],
    heads: tuple[int, int, int],
    blocks: range,
    how: Launch,
    *tables: Tensor,
    **constants: int,
) -> None:
    """Launch a kernel of gather or scatter.

    Args:
        tensors: [·, B, ·, D], as the kernel takes them.
        sizes: (N, L, p, S, chunks).
        heads: H; the heads over which the grid runs, of all that the kernel knows; and the first of them.
        blocks: of each chunk.
        tables: other tensors that the kernel reads, contiguous.
    """
    (_, batch, _, dim), groups = tensors[0].shape, places.shape[1]
    tensors = [last_contiguous(x) for x in tensors]
    length, levels, pooling, _, chunks = sizes
    with on_device_of(places):
        kernel[(len(blocks) * chunks, batch * heads[1])](
            *tensors,
            places,
            *tables,
            *(x.stride()[:3] for x in tensors),
            length // chunks,
            chunks,
            blocks.start,
            len(blocks),
            places.shape[2],
            *heads,
            groups,
            D=dim,
            BLOCK_D=padded(dim),
            P=pooling,
            L=levels,
            BLOCK=how.rows,
            num_warps=how.warps,
            **constants,
        )


def run[T](op: CustomOpDef, function: Callable[..., T], *args: object) -> T:
    """Call `op` where torch.compile traces, for which it is opaque; else its `function`, which costs the host far less."""
    return op(*args) if torch.compiler.is_compiling() else function(*args)


def last_contiguous(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
