"""What all pairs of tiles need: queries decayed from their tile's first row, keys to their tile's end, and totals between.

A query of tile I and a key of tile J < I are then (q̃ exp(sum of the totals of the tiles between)) · k̃: every exponent is a sum
of gates that lie between the two, and none is a difference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, strides
from megatron_lighthouse.kernels.wall.tiles import (
    Blocks,
    bounded,
    channels,
    channels_of,
    from_first,
    parts,
    put_channels,
    rows_of,
    to_last,
)


@triton.jit(repr=lambda _: "wall_prepare", do_not_specialize=["rows"])
def prepare_kernel(
    p_q,
    p_k,
    p_gate,
    p_near,
    p_far,
    p_totals,
    strides_q,
    strides_k,
    strides_gate,
    strides_near,
    strides_far,
    strides_totals,
    rows,
    H,
    R,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    POWER: tl.constexpr,
):
    """Program (b * H + h of each tile, some channels): few, for little is held then, and more programs run at a time."""
    tiles = (rows + ROWS - 1) // ROWS
    heads = tl.num_programs(0) // tiles
    i_tile, i_head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    i_m = tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)
    i_k = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    g = bounded(channels(p_gate + i_b * strides_gate[1] + i_h * strides_gate[2], strides_gate[0], i_m, rows, i_k, K))
    cut = parts(g, p_q.dtype.element_ty)
    q = channels(p_q + i_b * strides_q[1] + i_h * strides_q[2], strides_q[0], i_m, rows, i_k, K)
    k = channels(p_k + i_b * strides_k[1] + i_h // R * strides_k[2], strides_k[0], i_m, rows, i_k, K)
    p_near += i_b * strides_near[1] + i_h * strides_near[2]
    p_far += i_b * strides_far[1] + i_h * strides_far[2]
    put_channels(p_near, strides_near[0], i_m, rows, q * tl.exp(from_first(cut, POWER, ROWS)), i_k, K)
    put_channels(p_far, strides_far[0], i_m, rows, k * tl.exp(to_last(cut, POWER, ROWS)), i_k, K)
    p_totals += i_tile * strides_totals[0] + i_b * strides_totals[1] + i_h * strides_totals[2]
    tl.store(p_totals + i_k, tl.sum(g, 0), mask=i_k < K)


class Prepared(NamedTuple):
    """[n, B, H, K] in the inputs' dtype, and [tiles, B, H, K] fp32."""

    near: Tensor
    far: Tensor
    totals: Tensor


def prepare(query: Tensor, key: Tensor, gate: Tensor, blocks: Blocks) -> Prepared:
    """Of tensors whose last dimension is contiguous."""
    rows, batch, heads, dim = query.shape
    tiles = cdiv(rows, blocks.rows)
    near, far = (torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(2))
    totals = torch.empty(tiles, batch, heads, dim, dtype=torch.float32, device=query.device)
    tensors = [query, key, gate, near, far, totals]
    enqueue(
        prepare_kernel,
        (tiles * batch * heads, cdiv(dim, channels_of(dim)), 1),
        tensors,
        (*(strides(x) for x in tensors), rows, heads, heads // key.shape[2]),
        {"K": dim, "CHANNELS": channels_of(dim), **rows_of(blocks.rows)},
        num_warps=blocks.warps,
    )
    return Prepared(near, far, totals)
