"""dg_t = Σ_{s >= t, same document} dP_s: within tiles in fp32, between them in fp64, and 0 at a document's first row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, strides
from megatron_lighthouse.kernels.wall.tiles import blocks_of, channels, channels_of, put_channels


@triton.jit
def begun(p_first, i_m, rows):
    """[ROWS] int32: how many documents begin in a tile up to each of its rows."""
    return tl.cumsum((tl.load(p_first + i_m, mask=i_m < rows, other=-1) == i_m).to(tl.int32), 0)


@triton.jit(repr=lambda _: "wall_suffix_totals", do_not_specialize=["rows"])
def totals_kernel(
    p_sums,
    p_totals,
    p_begun,
    p_first,
    strides_sums,
    strides_totals,
    rows,
    H,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (b * H + h of each tile, some channels): the sum of its rows of the document that began before it.

    p_begun: documents in it.
    """
    tiles = (rows + ROWS - 1) // ROWS
    heads = tl.num_programs(0) // tiles
    i_tile, i_head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    i_m, i_k = i_tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    documents = begun(p_first, i_m, rows)
    tl.store(p_begun + i_tile, tl.max(documents, 0), mask=(i_head == 0) & (tl.program_id(1) == 0))
    sums = channels(p_sums + i_b * strides_sums[1] + i_h * strides_sums[2], strides_sums[0], i_m, rows, i_k, K)
    total = tl.sum(tl.where((documents == 0)[:, None], sums, 0.0), 0)
    p_totals += i_tile.to(tl.int64) * strides_totals[0] + i_b * strides_totals[1] + i_h * strides_totals[2]
    tl.store(p_totals + i_k, total, mask=i_k < K)


@triton.jit(repr=lambda _: "wall_suffix_sums", do_not_specialize=["rows"])
def suffix_kernel(
    p_sums,
    p_totals,
    p_begun,
    p_first,
    strides_sums,
    strides_totals,
    rows,
    H,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Likewise, in place: a tile's last document goes on up to the tile in which another begins."""
    tiles = (rows + ROWS - 1) // ROWS
    heads = tl.num_programs(0) // tiles
    i_tile, i_head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    i, i_k = tl.arange(0, ROWS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    i_m = i_tile * ROWS + i
    p_totals += i_b * strides_totals[1] + i_h * strides_totals[2] + i_k[None, :]
    later = tl.zeros([CHANNELS], tl.float64)
    i_first, ended = i_tile + 1, 0
    while ended == 0:
        i_t = i_first + tl.arange(0, 32)
        documents = tl.load(p_begun + i_t, mask=i_t < tiles, other=1)
        seen = (i_t < tiles) & (tl.cumsum(documents, 0) == documents)
        p_tile = p_totals + i_t.to(tl.int64)[:, None] * strides_totals[0]
        later += tl.sum(tl.load(p_tile, mask=seen[:, None] & (i_k < K)[None, :], other=0.0).to(tl.float64), 0)
        i_first += 32
        ended = tl.sum(documents, 0)
    p_sums += i_b * strides_sums[1] + i_h * strides_sums[2]
    documents = begun(p_first, i_m, rows)
    summed = (i[None, :] >= i[:, None]) & (documents[None, :] == documents[:, None])
    sums = tl.dot(summed.to(tl.float32), channels(p_sums, strides_sums[0], i_m, rows, i_k, K), input_precision="tf32x3")
    sums += tl.where((documents == tl.max(documents, 0))[:, None], later.to(tl.float32)[None, :], 0.0)
    begins = tl.load(p_first + i_m, mask=i_m < rows, other=-1) == i_m
    put_channels(p_sums, strides_sums[0], i_m, rows, tl.where(begins[:, None], 0.0, sums), i_k, K)


def suffix_sums(sums: Tensor, first: Tensor) -> Tensor:
    """dg [n, B, H, K] from dP, in place.

    Args:
        sums: dP, fp32, the last dimension contiguous.
        first: [n] int32, contiguous. Where first[t] == t a document begins, as far as sums go: no pair crosses.
    """
    rows, batch, heads, dim = sums.shape
    blocks = blocks_of("sums", dim, sums.element_size())
    tiles = cdiv(rows, blocks.rows)
    totals = torch.empty(tiles, batch, heads, dim, dtype=torch.float32, device=sums.device)
    documents = torch.empty(tiles, dtype=torch.int32, device=sums.device)
    shape = {"K": dim, "CHANNELS": channels_of(dim), "ROWS": blocks.rows}
    for kernel in (totals_kernel, suffix_kernel):
        enqueue(
            kernel,
            (tiles * batch * heads, cdiv(dim, channels_of(dim)), 1),
            [sums, totals, documents, first],
            (strides(sums), strides(totals), rows, heads),
            shape,
            num_warps=blocks.warps,
        )
    return sums


def scalar_suffix_sums(sums: Tensor, first: Tensor) -> Tensor:
    """Likewise [n, B, H] of [B, H, n], of which there are few."""
    rows = sums.shape[2]
    place = torch.arange(rows, device=sums.device, dtype=first.dtype)
    begins = first == place
    starts = place.where(begins, 0).cummax(0).values
    ends = torch.searchsorted(starts, starts, right=True)
    found = sums.permute(2, 0, 1).flip(0).cumsum(0, dtype=torch.float64).flip(0)
    found = torch.cat([found, torch.zeros_like(found[:1])])
    return (found[:-1] - found[ends]).masked_fill_(begins.view(-1, 1, 1), 0).float()
