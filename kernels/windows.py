"""The two ways through the pyramid that gather and scatter share: collect tokens into rows, spread rows over tokens.

Both are written as gathers through the inverse map `places` (entry -> row, or -1), so nothing is added by atomics, every
element is written once, and each sum has one order. Windows are counted in positions t + SHIFT: with SHIFT = 0 entry
(l, i) holds the tokens of its window (gather), with SHIFT = 1 the positions that it spills to (scatter), for
[i*p^l + p^l - 1, i*p^l + 2*p^l - 2] is window i + 1 of the positions t + 1.

Names: p_ pointers, i_ indices, m_ masks, stride_ strides in elements. Sums are in fp32, offsets of rows in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def level_offset(seq_length, LEVEL: tl.constexpr, P: tl.constexpr):
    """The number of entry (LEVEL, 0) in the concatenated pyramid."""
    offset = seq_length * 0
    for l in tl.static_range(LEVEL):
        offset += seq_length // P**l
    return offset


@triton.jit
def collect(
    p_x,
    p_places,
    p_rows,
    stride_x,
    stride_rows,
    seq_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    MEAN: tl.constexpr,
):
    """rows[place(l, i)] = the sum (or mean) of x over entry (l, i), for BLOCK coarsest windows; reads x once.

    Args:
        p_x: tokens [N, D] of one batch element and head, `stride_x` apart.
        p_places: [pyramid length] int32 of that batch element and group.
        p_rows: rows [S, D], `stride_rows` apart.
    """
    i_window = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_d = tl.arange(0, BLOCK_D)
    m_d = (i_d < D)[None, :]
    sums = (tl.zeros([BLOCK, BLOCK_D], tl.float32),) * (L - 1)
    for i_part in range(P ** (L - 2)):
        i_unit = i_window * P ** (L - 2) + i_part
        tokens = ()
        for c in tl.static_range(P):
            i_token = i_unit * P + c - SHIFT
            m_token = ((i_token >= 0) & (i_token < seq_length))[:, None]
            tokens += (tl.load(p_x + i_token.to(tl.int64)[:, None] * stride_x + i_d[None, :], mask=m_token & m_d, other=0.0),)
        unit = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for c in tl.static_range(P):
            _emit(tokens[c], i_unit * P + c - SHIFT, p_places, p_rows, stride_rows, seq_length, i_d, m_d, 0, P, False)
            unit += tokens[c].to(tl.float32)
        carried = ()
        for l in tl.static_range(1, L):
            total = sums[l - 1] + unit
            # the part that completes a window of level l stores it and starts the next
            complete = (i_part + 1) % P ** (l - 1) == 0
            i_entry = tl.where(complete, (i_unit + 1) // P ** (l - 1) - 1 - SHIFT, -1)
            _emit(total, i_entry, p_places, p_rows, stride_rows, seq_length, i_d, m_d, l, P, MEAN)
            carried += (tl.where(complete, 0.0, total),)
        sums = carried


@triton.jit
def _emit(
    x, i_entry, p_places, p_rows, stride_rows, seq_length, i_d, m_d, LEVEL: tl.constexpr, P: tl.constexpr, MEAN: tl.constexpr
):
    """Store the rows of entries that are gathered; those that lie outside of the sequence are not."""
    m_entry = (i_entry >= 0) & (i_entry < seq_length // P**LEVEL)
    i_row = tl.load(p_places + level_offset(seq_length, LEVEL, P) + i_entry, mask=m_entry, other=-1)
    if MEAN:
        x = x * (1.0 / P**LEVEL)
    p_out = p_rows + i_row.to(tl.int64)[:, None] * stride_rows + i_d[None, :]
    tl.store(p_out, x.to(p_rows.dtype.element_ty), mask=(i_row >= 0)[:, None] & m_d)


@triton.jit
def spread(
    p_rows,
    p_places,
    p_out,
    stride_rows,
    stride_out,
    seq_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    MEAN: tl.constexpr,
):
    """out[t] = the sum over levels of rows[place(l, (t + SHIFT) // p^l - SHIFT)] (over p^l), for BLOCK tokens.

    Args:
        p_rows: rows [S, D] of one batch element and head, `stride_rows` apart.
        p_places: as for `collect`.
        p_out: tokens [N, D], `stride_out` apart; every one is written.
    """
    i_token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_d = tl.arange(0, BLOCK_D)
    m_d = (i_d < D)[None, :]
    m_token = i_token < seq_length
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for l in tl.static_range(L):
        # window 0 of the shifted positions belongs to no entry
        i_window = (i_token + SHIFT) // P**l
        p_place = p_places + level_offset(seq_length, l, P) + i_window - SHIFT
        i_row = tl.load(p_place, mask=m_token & (i_window >= SHIFT), other=-1)
        p_x = p_rows + i_row.to(tl.int64)[:, None] * stride_rows + i_d[None, :]
        x = tl.load(p_x, mask=(i_row >= 0)[:, None] & m_d, other=0.0).to(tl.float32)
        if MEAN:
            x = x * (1.0 / P**l)
        total += x
    p_token = p_out + i_token.to(tl.int64)[:, None] * stride_out + i_d[None, :]
    tl.store(p_token, total.to(p_out.dtype.element_ty), mask=m_token[:, None] & m_d)
