"""Tiles of rows, sums of gates outward from an anchor, and the logits within a tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import LOG2_E, padded
from megatron_lighthouse.kernels.parallax.tiles import tile


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
        return Blocks(64 if wide <= 128 else 32, 4, 1)
    return Blocks(64 if wide <= 128 else 32, 8 if kernel == "queries" else 4, 2 if wide <= 128 else 1)


def constants_of(query: Tensor, value: Tensor, scale: float, scalar: bool, rows: int) -> dict[str, int | float]:
    """The constants of a kernel over pairs, in its order. SCALE is of exponents of 2; SCALAR: whether there is γ."""
    key_dim, value_dim = query.shape[-1], value.shape[-1]
    return constants(key_dim, value_dim, scale, scalar, query.dtype == torch.float32, rows)


def constants(key_dim: int, value_dim: int, scale: float, scalar: bool, wide: bool, rows: int) -> dict[str, int | float]:
    """Likewise; `wide`: inputs in fp32."""
    own: dict[str, int | float] = {"SCALE": scale * LOG2_E, "SCALAR": scalar, "WIDE": wide, "K": key_dim, "V": value_dim}
    return {**own, "BLOCK_K": padded(key_dim), "BLOCK_V": padded(value_dim), **rows_of(rows)}


def near_constants(of: dict[str, int | float]) -> dict[str, int | float]:
    """Of `near`, from those: in 16 bits its blocks have 128 channels at least, those that are not there masked.

    ptxas 12.8, which Triton 3.6 brings, makes wrong code of blocks of 64: an H200 met an illegal address in the tensor cores'
    descriptors, and was right with ptxas' optimiser off, and with blocks of 128.
    """
    return of if of["WIDE"] else {**of, **{name: max(128, of[name]) for name in ("BLOCK_K", "BLOCK_V")}}


def rows_of(rows: int) -> dict[str, int]:
    """Of a tile, and 2 to which power that is."""
    return {"ROWS": rows, "POWER": rows.bit_length() - 1}


def channels_of(dim: int) -> int:
    """Of a program that holds few: where there are few programs, or so that many run at a time."""
    return min(32, padded(dim))


@triton.jit
def bounded(g):
    """In fp32, none below -20, with which a channel of a key keeps 2e-9 of its weight. NaN stays."""
    g = g.to(tl.float32)
    return tl.where(g < -20.0, -20.0, g)


@triton.jit
def gates(p_gate, stride, i_row, rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS, BLOCK_K] fp32, `bounded`."""
    return bounded(tile(p_gate, stride, i_row, rows, K, BLOCK_K))


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
def parts(g, dtype: tl.constexpr):
    """What `added` takes of g: for inputs in bf16 two tiles in bf16 whose sum has 16 of its bits, else g itself.

    A sum of one sign is off by 2^-17 of itself then, so that no decay is off by more than 3e-6: bf16 rounds it to 2e-3.
    """
    if dtype == tl.bfloat16:
        high = g.to(tl.bfloat16)
        low = (g - high.to(tl.float32)).to(tl.bfloat16)
    else:
        high, low = g, g
    return high, low


@triton.jit
def added(chosen, g):
    """[ROWS, BLOCK_K] sums of the chosen rows [ROWS, ROWS] of `parts`, by the tensor cores: a scan would take far longer."""
    if g[0].dtype == tl.bfloat16:
        ones = chosen.to(tl.bfloat16)
        found = tl.dot(ones, g[0], tl.dot(ones, g[1]))
    else:
        found = tl.dot(chosen.to(tl.float32), g[0], input_precision="tf32x3")
    return found


@triton.jit
def from_first(g, power, ROWS: tl.constexpr):
    """Sums of gates within each 2^power rows, from the first row up to each row."""
    i = tl.arange(0, ROWS)
    return added(together(power, ROWS) & (i[:, None] >= i[None, :]), g)


@triton.jit
def to_last(g, power, ROWS: tl.constexpr):
    """Likewise over the rows after each row: nothing is a difference."""
    i = tl.arange(0, ROWS)
    return added(together(power, ROWS) & (i[:, None] < i[None, :]), g)


@triton.jit
def to_middle(g, power, ROWS: tl.constexpr):
    """(whether a row lies after the middle of its 2^power rows, sums of gates between that and the row), in one product."""
    i = tl.arange(0, ROWS)
    later = (i >> (power - 1) & 1 == 1)[:, None]
    between = (later & (i[:, None] >= i[None, :])) | (~later & (i[:, None] < i[None, :]))
    return later, added(together(power - 1, ROWS) & between, g)


@triton.jit
def anchored(g, power, ROWS: tl.constexpr):
    """Decays of queries and keys to the middle of each 2^power rows, 0 for queries before it and for keys after it."""
    later, exponent = to_middle(g, power, ROWS)
    decay = tl.exp(exponent)
    return tl.where(later, decay, 0.0), tl.where(later, 0.0, decay)


@triton.jit
def anchored_corner(g, ROWS: tl.constexpr):
    """Those of all queries and keys to the middle of each 8 rows: exponents lie within ±80."""
    later, exponent = to_middle(g, 3, ROWS)
    exponent = tl.where(later, exponent, -exponent)
    return tl.exp(exponent), tl.exp(-exponent)


@triton.jit
def held(x, dtype: tl.constexpr):
    """`x` within ±e^80 in bf16 if that is the inputs' dtype, else in fp32: fp16 cannot hold it."""
    if dtype == tl.bfloat16:
        return x.to(dtype)
    else:
        return x.to(tl.float32)


@triton.jit
def together(power, ROWS: tl.constexpr):
    """[ROWS, ROWS]: which pairs lie in the same 2^power rows."""
    block = tl.arange(0, ROWS) >> power
    return block[:, None] == block[None, :]


@triton.jit
def channels(p_x, stride, i_row, rows, i_k, K: tl.constexpr):
    """[ROWS, CHANNELS] of the channels i_k of rows."""
    p_x += i_row.to(tl.int64)[:, None] * stride + i_k[None, :]
    return tl.load(p_x, mask=(i_row < rows)[:, None] & (i_k < K)[None, :], other=0.0)


@triton.jit
def put_channels(p_x, stride, i_row, rows, x, i_k, K: tl.constexpr):
    """The way back."""
    p_x += i_row.to(tl.int64)[:, None] * stride + i_k[None, :]
    tl.store(p_x, x.to(p_x.dtype.element_ty), mask=(i_row < rows)[:, None] & (i_k < K)[None, :])


@triton.jit
def gates_of(p_gate, stride, i_row, rows, i_k, K: tl.constexpr, dtype: tl.constexpr):
    """`parts` of such gates."""
    return parts(bounded(channels(p_gate, stride, i_row, rows, i_k, K)), dtype)


@triton.jit
def near_logits(
    p_q,
    p_k,
    p_gate,
    stride_q,
    stride_k,
    stride_gate,
    i_m,
    rows,
    WIDE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    POWER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """[ROWS, ROWS] of the pairs of a tile, without scale and γ; those of a query with later keys are not meant.

    Of the tile's halves, quarters … down to 8 rows the later queries with the earlier keys, anchored between them; and the
    pairs within 8 rows, anchored in their middle. Some channels at a time, so that all of theirs is in registers.
    """
    precision: tl.constexpr = "ieee" if WIDE else "tf32x3"
    CHANNELS: tl.constexpr = BLOCK_K if BLOCK_K < 32 else 32
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for first in range(0, BLOCK_K, CHANNELS):
        i_k = first + tl.arange(0, CHANNELS)
        q, k = channels(p_q, stride_q, i_m, rows, i_k, K), channels(p_k, stride_k, i_m, rows, i_k, K)
        g = gates_of(p_gate, stride_gate, i_m, rows, i_k, K, q.dtype)
        w_q, w_k = anchored_corner(g, ROWS)
        logits = tl.dot(held(q * w_q, q.dtype), tl.trans(held(k * w_k, q.dtype)), input_precision=precision)
        total += tl.where(together(3, ROWS), logits, 0.0)
        for power in range(4, POWER + 1):
            w_q, w_k = anchored(g, power, ROWS)
            product = tl.dot((q * w_q).to(q.dtype), tl.trans((k * w_k).to(k.dtype)), input_precision="ieee")
            total += tl.where(together(power, ROWS), product, 0.0)
    return total


@triton.jit
def between(scalar, ROWS: tl.constexpr):
    """[ROWS, ROWS] sums of γ after a key up to a query, within a tile."""
    i = tl.arange(0, ROWS)
    return tl.cumsum(tl.where(i[:, None] > i[None, :], scalar[:, None], 0.0), 0)
