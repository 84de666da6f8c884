"""Which implementation of Wall's diagonal runs where: the kernels, or plain PyTorch; and what attends to earlier pieces."""

from __future__ import annotations

import importlib
from typing import cast

import torch
from torch import Tensor

from megatron_lighthouse.gpu import kernels_problem
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.softmax.blocks import Plain as PlainBlock
from megatron_lighthouse.softmax.blocks import block_for
from megatron_lighthouse.wall import decay, reference
from megatron_lighthouse.wall.biased import COLUMNS
from megatron_lighthouse.wall.config import WRONG_IN_FP16
from megatron_lighthouse.wall.decay import Decays
from megatron_lighthouse.wall.diagonal import Diagonal
from megatron_lighthouse.wall.earlier import Earlier, Plain, Stock

SEEN = {
    torch.bfloat16: {(32, 32), (64, 64), (128, 128), (256, 256), (64, 128), (128, 64)},
    torch.float32: {(64, 64), (128, 128)},
}
"""Blocks of K and V channels with which the kernels were held to float64 on an H200, by `benchmarks/wall.py --only-check`. In
bf16 heads of 48, 80 and 96 too, for which a part of a block is masked."""

MULTIPLE = 8
"""Of which stock kernels want channels."""


def makers_for(name: str, device: torch.device, dtype: torch.dtype, dims: tuple[int, int]) -> tuple[Diagonal, Decays]:
    """What `name` of --wall-kernels stands for: what makes the diagonal, and what decays rows to anchors.

    Args:
        dims: the head dimensions K and V.

    Raises:
        ValueError: 'triton' where the kernels cannot run, or are wrong.
    """
    plain = cast(Diagonal, reference), cast(Decays, decay)
    if name == "reference" or (name == "auto" and device.type != "cuda"):
        return plain
    problem = kernels_problem(device.type, dtype, max(dims)) or (WRONG_IN_FP16 if dtype == torch.float16 else None)
    if problem is None and name == "auto":
        problem = _unseen(dtype, dims)
    if problem is None:
        kernels = importlib.import_module("megatron_lighthouse.kernels.wall")
        return cast(Diagonal, kernels), cast(Decays, kernels)
    if name == "triton":
        raise ValueError(f"--wall-kernels triton cannot run: {problem}. Use auto or reference.")
    say_once(f"wall: the diagonal runs in plain PyTorch, many times slower than the kernels: {problem}.")
    return plain


def _unseen(dtype: torch.dtype, dims: tuple[int, int]) -> str | None:
    """Why `auto` leaves the kernels. In bf16 a multiple of 16 goes by its block; in fp32 none was seen masked."""
    from megatron_lighthouse.kernels.launch import padded

    seen = SEEN[dtype]
    if tuple(n if n % 16 or dtype == torch.float32 else padded(n) for n in dims) in seen:
        return None
    kind, blocks = str(dtype).removeprefix("torch."), ", ".join(f"{k} and {v}" for k, v in sorted(seen))
    return (
        f"on a GPU they were seen right in {kind} for keys and values in blocks of {blocks} channels, not yet for "
        f"{dims[0]} and {dims[1]}; --wall-kernels triton takes them all the same"
    )


def earlier_for(query: Tensor, value: Tensor, gate_heads: int, scale: float, biased: bool, masked: bool) -> Earlier:
    """What attends to pieces before a query's own: on a GPU a stock kernel, where it can.

    Args:
        gate_heads: heads of the gates, and so of decayed keys.
        biased: whether there are scalar gates.
        masked: whether there is a window.
    """
    if query.device.type != "cuda":
        return Plain(scale)
    if masked:
        say_once("wall: attention to earlier pieces runs in plain PyTorch, slowly: stock kernels know no window.")
        return Plain(scale)
    dims = (query.shape[-1] + COLUMNS if biased else query.shape[-1], value.shape[-1])
    if dims[0] == dims[1] and not biased:
        return Stock(block_for("auto", query, query[:, :, :gate_heads], scale), scale)
    wide = -(-max(dims) // MULTIPLE) * MULTIPLE
    rows = query.new_empty(0, *query.shape[1:3], wide)
    block = block_for("auto", rows, rows if biased else rows[:, :, :gate_heads], scale)
    if not isinstance(block, PlainBlock):
        return Stock(block, scale, wide)
    what = "with scalar gates " if biased else ""
    say_once(f"wall: attention to earlier pieces runs in plain PyTorch, slowly: {what}its rows take {wide} channels.")
    return Plain(scale)
