"""How the kernels are launched: one small table, the same on every rank, and nothing tuned at run time.

What counts is that a thread moves 16 bytes at a time and has several loads under way; beyond that the shape of a block hardly
matters (tried on an H100 from 1 to 32 KB and 1 to 8 warps). So one line a step, for rows of any size.

A layer's launches are alike from iteration to iteration. Triton would find out each time which compiled kernel they need, at
more cost to the host than the launch itself: `enqueue` keeps it, by all that the choice hangs on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
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


# bytes that one program holds at a time, and its warps. collect: gather forward, scatter backward; spread: the other two, merge
_BYTES = {"score": (16384, 4), "collect": (2048, 2), "spread": (4096, 4)}


@cache
def launch(step_name: str, dim: int, itemsize: int) -> Launch:
    """The launch of `step_name` (score, collect, spread) for rows of `dim` elements of `itemsize` bytes."""
    size, warps = _BYTES[step_name]
    return Launch(max(4, min(128, size // (padded(dim) * itemsize))), warps)


def padded(n: int) -> int:
    """The power of two that a kernel's block holds `n` elements in: at least 16."""
    return max(16, power_of_2(n))


def power_of_2(n: int) -> int:
    """The least power of two that is not below `n`. Triton's own is made for kernels, and slow on the host."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; likewise."""
    return -(-a // b)


_compiled: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels: by kernel, device, the dtypes and the alignment of tensors, and the values of all other arguments."""
MOST_KEPT = 4096
"""Rows of other lengths have other strides, so that where lengths change from step to step there is no end of them."""
DIRECT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
"""Whether a compiled kernel is called with the arguments of its source, constants included: so it is from Triton 3.3 on."""


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory that Triton writes descriptors for the bulk copy engine to."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def enqueue(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor],
    numbers: tuple[int | tuple[int, ...], ...],
    constants: Mapping[str, float],
    varying: int = 0,
    **options: int | bool,
) -> None:
    """Launch a kernel whose parameters are tensors, then numbers, then constants, in this order.

    Args:
        varying: how many of the last numbers change from call to call: the kernel must not be specialised for them.
        options: of the compiler, such as num_warps.
    """
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():  # the one on which Triton launches
        with torch.cuda.device(device):
            return enqueue(kernel, grid, tensors, numbers, constants, varying, **options)
    kinds = [x.dtype for x in tensors], [x.data_ptr() % 16 == 0 for x in tensors]  # Triton's two specialisations of a pointer
    same = numbers[: len(numbers) - varying]
    known = (id(kernel), device, *kinds[0], *kinds[1], same, *constants.values(), *options.values())
    if constants.get("BULK"):
        triton.set_allocator(_scratch)  # of this thread: backward has its own
    compiled = _compiled.get(known)
    if compiled is not None:
        compiled[grid](*tensors, *numbers, *constants.values())
        return None
    compiled = kernel[grid](*tensors, *numbers, **constants, **options)
    if DIRECT and compiled is not None:  # the interpreter compiles nothing
        if len(_compiled) >= MOST_KEPT:
            _compiled.clear()
        assert kernel.arg_names[len(tensors) + len(numbers) :] == list(constants), "the order of `enqueue`"
        _compiled[known] = compiled
    return None


def launch_windows(
    kernel: Any,
    tensors: Sequence[Tensor],
    places: Tensor,
    sizes: Sequence[int],
    heads: tuple[int, ...],
    blocks: range,
    how: Launch,
    *,
    dim: int | None = None,
    tables: Sequence[Tensor] = (),
    **constants: int,
) -> None:
    """Launch a kernel of gather or scatter.

    Args:
        tensors: [·, B, ·, D], as the kernel takes them.
        sizes: (N, L, p, S, chunks).
        heads: H; the heads over which the grid runs, of all that the kernel knows; the first of them; and what else the kernel
            is told of heads.
        blocks: of each chunk.
        dim: D of those heads; that of the first tensor by default.
        tables: other tensors that the kernel reads, contiguous.
    """
    (_, batch, _, first_dim), groups = tensors[0].shape, places.shape[1]
    dim = dim or first_dim
    tensors = [last_contiguous(x) for x in tensors]
    length, levels, pooling, _, chunks = sizes
    counts = (length // chunks, chunks, blocks.start, len(blocks), places.shape[2])
    shape = {"D": dim, "BLOCK_D": padded(dim), "P": pooling, "L": levels, "BLOCK": how.rows}
    enqueue(
        kernel,
        (len(blocks) * chunks, batch * heads[1], 1),
        [*tensors, places, *tables],
        (*(strides(x) for x in tensors), *counts, *heads, groups),
        {**shape, **constants},
        num_warps=how.warps,
    )


def run[T](op: CustomOpDef, function: Callable[..., T], *args: object) -> T:
    """Call `op` where torch.compile traces, for which it is opaque; else its `function`, which costs the host far less."""
    return op(*args) if torch.compiler.is_compiling() else function(*args)


def last_contiguous(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Those of the first three dimensions, as kernels take them."""
    first, second, third = x.stride()[:3]
    return first, second, third
