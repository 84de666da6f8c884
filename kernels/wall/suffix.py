"""dg_t = Σ_{s >= t, same document} dP_s: within tiles in fp32, between them in fp64, and 0 at a document's first row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, padded, strides
from megatron_lighthouse.kernels.parallax.tiles import put, tile
from megatron_lighthouse.kernels.wall.tiles import blocks_of


@triton.jit(repr=lambda _: "wall_suffix_totals", do_not_specialize=["rows"])
def totals_kernel(
    p_sums,
    p_totals,
    p_starts,
    strides_sums,
    strides_totals,
    rows,
    H,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program b * H + h of each tile: the sum of its rows of the document that began before it."""
    tiles = (rows + ROWS - 1) // ROWS
    heads = tl.num_programs(0) // tiles
    i_tile, i_head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    i_m, i_k = i_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    starts = tl.load(p_starts + i_m, mask=i_m < rows, other=0)
    sums = tile(p_sums + i_b * strides_sums[1] + i_h * strides_sums[2], strides_sums[0], i_m, rows, K, BLOCK_K)
    total = tl.sum(tl.where((starts < i_tile * ROWS)[:, None], sums, 0.0), 0)
    p_totals += i_tile.to(tl.int64) * strides_totals[0] + i_b * strides_totals[1] + i_h * strides_totals[2]
    tl.store(p_totals + i_k, total, mask=i_k < K)


@triton.jit(repr=lambda _: "wall_suffix_sums", do_not_specialize=["rows"])
def suffix_kernel(
    p_sums, p_later, p_starts, strides_sums, strides_later, rows, H, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr
):
    """Likewise, in place. p_later: of each tile, what later tiles hold of the document that its last row is of."""
    tiles = (rows + ROWS - 1) // ROWS
    heads = tl.num_programs(0) // tiles
    i_tile, i_head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    i, i_k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    i_m, end = i_tile * ROWS + i, i_tile * ROWS + ROWS
    p_sums += i_b * strides_sums[1] + i_h * strides_sums[2]
    p_later += i_tile.to(tl.int64) * strides_later[0] + i_b * strides_later[1] + i_h * strides_later[2]
    starts = tl.load(p_starts + i_m, mask=i_m < rows, other=rows)
    goes_on = starts == tl.load(p_starts + end, mask=end < rows, other=-1)
    summed = (i[None, :] >= i[:, None]) & (starts[None, :] == starts[:, None])
    sums = tl.dot(summed.to(tl.float32), tile(p_sums, strides_sums[0], i_m, rows, K, BLOCK_K), input_precision="tf32x3")
    sums += tl.where(goes_on[:, None], tl.load(p_later + i_k, mask=i_k < K, other=0.0)[None, :], 0.0)
    put(p_sums, strides_sums[0], i_m, rows, tl.where((starts == i_m)[:, None], 0.0, sums), K, BLOCK_K)


def suffix_sums(sums: Tensor, starts: Tensor) -> Tensor:
    """dg [n, B, H, K] from dP, in place.

    Args:
        sums: dP, fp32, the last dimension contiguous.
        starts: [n] int32, the row at which each row's document begins.
    """
    rows, batch, heads, dim = sums.shape
    blocks = blocks_of("sums", dim, sums.element_size())
    tiles = cdiv(rows, blocks.rows)
    totals = torch.empty(tiles, batch, heads, dim, dtype=torch.float32, device=sums.device)
    shape = {"K": dim, "BLOCK_K": padded(dim), "ROWS": blocks.rows}
    grid = (tiles * batch * heads, 1, 1)
    given = (strides(sums), strides(totals), rows, heads)
    enqueue(totals_kernel, grid, [sums, totals, starts], given, shape, num_warps=blocks.warps)
    later = _later(totals, starts, blocks.rows)
    enqueue(suffix_kernel, grid, [sums, later, starts], given, shape, num_warps=blocks.warps)
    return sums


def scalar_suffix_sums(sums: Tensor, starts: Tensor) -> Tensor:
    """Likewise [n, B, H] of [B, H, n], of which there are few."""
    rows = sums.shape[2]
    place = torch.arange(rows, device=sums.device)
    ends = torch.searchsorted(starts, starts, right=True)
    found = _from_here(sums.permute(2, 0, 1))
    found = found[:-1] - found[ends]
    return found.masked_fill_((starts == place).view(-1, 1, 1), 0).float()


def _later(totals: Tensor, starts: Tensor, rows: int) -> Tensor:
    """Of each tile the sum of later `totals`, up to that tile in which another document begins."""
    tiles, device = len(totals), starts.device
    begin = torch.arange(tiles, device=device) * rows
    another = starts[(begin + rows - 1).clamp(max=len(starts) - 1)] >= begin
    last = torch.where(another, torch.arange(tiles, device=device), tiles - 1).flip(0).cummin(0).values.flip(0)
    last = torch.cat([last[1:], last[-1:]])  # from the next tile on
    found = _from_here(totals)
    return (found[1:] - found[last + 1]).float()


def _from_here(x: Tensor) -> Tensor:
    """[n + 1, ...] in fp64: the sum from each row to the end."""
    zero = x.new_zeros(1, *x.shape[1:], dtype=torch.float64)
    return torch.cat([x.flip(0).cumsum(0, dtype=torch.float64).flip(0), zero])
