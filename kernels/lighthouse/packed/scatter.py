"""Scatter over packed documents: as `kernels.lighthouse.scatter`, without a halo, for all documents in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import launch, new_rows
from megatron_lighthouse.kernels.lighthouse.packed.gather import COUNTS, launch_packed
from megatron_lighthouse.kernels.lighthouse.scatter import head_of
from megatron_lighthouse.kernels.lighthouse.windows import collect, spread
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.ranges import profiled


@triton.jit(repr=lambda _: "lighthouse_packed_scatter_forward", do_not_specialize=COUNTS)
def packed_scatter_forward_kernel(
    p_rows,
    p_out,
    p_places,
    p_documents,
    strides_rows,
    strides_out,
    H,
    G,
    documents,
    units,
    tokens,
    windows,
    pyramid_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of windows of level 1 of the shifted positions, head)."""
    p_map = p_places + (tl.program_id(1) // (H // G)).to(tl.int64) * pyramid_length
    p_rows, p_out = head_of(p_rows, strides_rows, H), head_of(p_out, strides_out, H)
    strides = strides_rows[0], strides_out[0], 0
    packed = p_documents, documents, units, tokens, windows
    spread(
        p_rows,
        p_map,
        p_out,
        p_out,
        p_out,
        *strides,
        0,
        0,
        0,
        0,
        False,
        D,
        BLOCK_D,
        P,
        L,
        BLOCK,
        1,
        False,
        False,
        0,
        0,
        0,
        packed,
        True,
    )


@triton.jit(repr=lambda _: "lighthouse_packed_scatter_backward", do_not_specialize=COUNTS)
def packed_scatter_backward_kernel(
    p_out,
    p_rows,
    p_places,
    p_documents,
    strides_out,
    strides_rows,
    H,
    G,
    documents,
    units,
    tokens,
    windows,
    pyramid_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of units of the shifted positions, head)."""
    p_map = p_places + (tl.program_id(1) // (H // G)).to(tl.int64) * pyramid_length
    p_rows, p_out = head_of(p_rows, strides_rows, H), head_of(p_out, strides_out, H)
    strides = strides_out[0], strides_rows[0], 0
    packed = p_documents, documents, units, tokens, windows
    collect(
        p_out,
        p_map,
        p_rows,
        p_rows,
        p_out,
        *strides,
        0,
        0,
        0,
        0,
        False,
        D,
        BLOCK_D,
        P,
        L,
        BLOCK,
        1,
        False,
        False,
        0,
        0,
        0,
        packed,
        True,
    )


class PackedScatter(torch.autograd.Function):
    """(rows, selection) -> output. Keeps only the map and the documents for backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, selection: Selection) -> Tensor:
        ctx.selection = selection
        out = new_rows(rows, selection.geometry.seq_length)
        with profiled("scatter"):
            _launch(packed_scatter_forward_kernel, (rows, out), selection, "spread")
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = new_rows(grad, ctx.selection.length)
        with profiled("scatter backward"):
            _launch(packed_scatter_backward_kernel, (grad, rows), ctx.selection, "collect")
        return rows, None


def _launch(kernel: Any, tensors: tuple[Tensor, ...], selection: Selection, step: str) -> None:
    packing, x = selection.geometry, tensors[0]
    assert isinstance(packing, Packing)
    parts = 1 if step == "collect" else packing.pooling ** (packing.levels - 2)
    how, heads = launch(step, x.shape[3], x.element_size()), (x.shape[2], x.shape[2], selection.places.shape[1])
    launch_packed(kernel, tensors, (selection.places,), packing, parts, heads, how)
