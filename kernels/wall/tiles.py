"""Tiles of rows, sums of gates outward from an anchor, and the logits within a tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import padded
from megatron_lighthouse.kernels.parallax.tiles import LOG2_E, tile


class Blocks(NamedTuple):
    """Rows that a tile holds: 16 times a power of two, and the same in all kernels; a program's warps; tiles under way."""

    rows: int
    warps: int
    stages: int


def blocks_of(kernel: str, dim: int, itemsize: int) -> Blocks:
    """By the larger of K and V and the dtype alone, for 'prepare', 'forward', 'near', 'queries', 'keys', 'sums' or 'decay'."""
    wide = padded(dim)
    if kernel == "sums":
        return Blocks(32, 4, 1)
    if kernel == "decay":
        return Blocks(64 if wide <= 128 else 32, 4, 1)
    if itemsize == 4:  # multiplied without tensor cores
        return Blocks(32, 4, 1)
    if kernel == "near":
        return Blocks(64 if wide <= 128 else 32, 16, 1)
    return Blocks(64 if wide <= 128 else 32, 8, 2 if wide <= 128 else 1)


def constants_of(query: Tensor, value: Tensor, scale: float, scalar: bool, rows: int) -> dict[str, int | float]:
    """The constants of a kernel over pairs, in its order. SCALE is of exponents of 2; SCALAR: whether there is γ."""
    key_dim, value_dim = query.shape[-1], value.shape[-1]
    return constants(key_dim, value_dim, scale, scalar, query.dtype == torch.float32, rows)


def constants(key_dim: int, value_dim: int, scale: float, scalar: bool, wide: bool, rows: int) -> dict[str, int | float]:
    """Likewise; `wide`: inputs in fp32."""
    own: dict[str, int | float] = {"SCALE": scale * LOG2_E, "SCALAR": scalar, "WIDE": wide, "K": key_dim, "V": value_dim}
    return {**own, "BLOCK_K": padded(key_dim), "BLOCK_V": padded(value_dim), "ROWS": rows}


@triton.jit
def gates(p_gate, stride, i_row, rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS, BLOCK_K] fp32, none below -20, with which a channel of a key keeps 2e-9 of its weight. NaN stays."""
    g = tile(p_gate, stride, i_row, rows, K, BLOCK_K).to(tl.float32)
    return tl.where(g < -20.0, -20.0, g)


@triton.jit
def scalars(p_scalar, stride, i_row, rows):
    """[ROWS] fp32 of γ, -inf made finite: it is multiplied by no query."""
    x = tl.load(p_scalar + i_row.to(tl.int64) * stride, mask=i_row < rows, other=0.0).to(tl.float32)
    return tl.where(x < -1e30, -1e30, x)


@triton.jit
def scalars_after(p_scalar, stride, i_row, rows, ROWS: tl.constexpr):
    """[ROWS] sums of γ over the rows of a tile after each row."""
    last = tl.arange(0, ROWS) == ROWS - 1
    return tl.cumsum(tl.where(last, 0.0, scalars(p_scalar, stride, i_row + 1, rows)), 0, reverse=True)


@triton.jit
def outward(g, g_next, LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of gates within each LENGTH rows: from the first row up to each row, and over those after it. None is a difference.

    `g_next` holds the gates of the rows after those of `g`.
    """
    last = (tl.arange(0, ROWS) % LENGTH == LENGTH - 1)[:, None]
    g_next = tl.where(last, 0.0, g_next)
    before = tl.cumsum(tl.reshape(g, [ROWS // LENGTH, LENGTH, BLOCK_K]), 1)
    after = tl.cumsum(tl.reshape(g_next, [ROWS // LENGTH, LENGTH, BLOCK_K]), 1, reverse=True)
    return tl.reshape(before, [ROWS, BLOCK_K]), tl.reshape(after, [ROWS, BLOCK_K])


@triton.jit
def anchored(g, g_next, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Decays of queries and keys to the middle of each 2 HALF rows, 0 for queries before it and for keys after it."""
    later = (tl.arange(0, ROWS) // HALF % 2 == 1)[:, None]
    before, after = outward(g, g_next, HALF, ROWS, BLOCK_K)
    return tl.where(later, tl.exp(before), 0.0), tl.where(later, 0.0, tl.exp(after))


@triton.jit
def anchored_corner(g, g_next, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Those of all queries and keys to the middle of each 8 rows: exponents lie within ±80."""
    later = (tl.arange(0, ROWS) // 4 % 2 == 1)[:, None]
    before, after = outward(g, g_next, 4, ROWS, BLOCK_K)
    exponent = tl.where(later, before, -after)
    return tl.exp(exponent), tl.exp(-exponent)


@triton.jit
def held(x, dtype: tl.constexpr):
    """`x` within ±e^80 in bf16 if that is the inputs' dtype, else in fp32: fp16 cannot hold it."""
    if dtype == tl.bfloat16:
        return x.to(dtype)
    else:
        return x.to(tl.float32)


@triton.jit
def together(LENGTH: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, ROWS]: which pairs lie in the same LENGTH rows."""
    block = tl.arange(0, ROWS) // LENGTH
    return block[:, None] == block[None, :]


@triton.jit
def near_logits(q, k, g, g_next, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS, ROWS] of the pairs of a tile, without scale and γ; those of a query with later keys are not meant.

    Of the tile's halves, quarters … down to 8 rows the later queries with the earlier keys, anchored between them; and the
    pairs within 8 rows, anchored in their middle.
    """
    precision: tl.constexpr = "ieee" if WIDE else "tf32x3"
    w_q, w_k = anchored_corner(g, g_next, ROWS, BLOCK_K)
    logits = tl.dot(held(q * w_q, q.dtype), tl.trans(held(k * w_k, q.dtype)), input_precision=precision)
    logits = tl.where(together(8, ROWS), logits, 0.0)
    for level in tl.static_range(4):
        if ROWS >> (level + 1) >= 8:
            w_q, w_k = anchored(g, g_next, ROWS >> (level + 1), ROWS, BLOCK_K)
            product = tl.dot((q * w_q).to(q.dtype), tl.trans((k * w_k).to(k.dtype)), input_precision="ieee")
            logits += tl.where(together(ROWS >> level, ROWS), product, 0.0)
    return logits


@triton.jit
def between(scalar, ROWS: tl.constexpr):
    """[ROWS, ROWS] sums of γ after a key up to a query, within a tile."""
    i = tl.arange(0, ROWS)
    return tl.cumsum(tl.where(i[:, None] > i[None, :], scalar[:, None], 0.0), 0)
