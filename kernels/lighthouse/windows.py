"""The two ways through the pyramid that gather and scatter share: collect tokens into rows, spread rows over tokens.

Both are written as gathers through the inverse map `places` (entry -> row, or -1), so nothing is added by atomics, every
element is written once, and each sum has one order. Windows are counted in positions t + SHIFT: with SHIFT = 0 entry
(l, i) holds the tokens of its window (gather), with SHIFT = 1 the positions that it spills to (scatter), for
[i*p^l + p^l - 1, i*p^l + 2*p^l - 2] is window i + 1 of the positions t + 1.

Tokens come in `chunks` of `length` each, and nothing crosses from one to the next: what spills past the end of a chunk belongs
to the chunk that follows in the whole sequence, and reaches it as its halo, the rows of the entries (l, -1). A launch works on
the `blocks` blocks of each chunk from `first` on.

Names: p_ pointers, i_ indices, m_ masks, stride_ strides in elements. Sums are in fp32, offsets of rows in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(-2)
"""No entry: -1 is the entry before the first of a chunk."""


@triton.jit
def level_offset(length, LEVEL: tl.constexpr, P: tl.constexpr):
    """The number of entry (LEVEL, 0) in the concatenated pyramid of `length` tokens."""
    offset = length * 0
    for l in tl.static_range(LEVEL):
        offset += length // P**l
    return offset


@triton.jit
def _chunk_of(p_x, stride, length, first, blocks):
    """The chunk of this program, its block in that chunk, and where the chunk's tokens begin."""
    i_chunk = tl.program_id(0) // blocks
    return i_chunk, tl.program_id(0) % blocks + first, p_x + (i_chunk * length).to(tl.int64) * stride


@triton.jit
def _level(p_places, i_chunk, length, chunks, LEVEL: tl.constexpr, P: tl.constexpr):
    """Where the entries of LEVEL of a chunk begin."""
    return p_places + chunks * level_offset(length, LEVEL, P) + i_chunk * (length // P**LEVEL)


@triton.jit
def collect(
    p_x,
    p_places,
    p_rows,
    p_halo,
    stride_x,
    stride_rows,
    stride_halo,
    length,
    chunks,
    first,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    MEAN: tl.constexpr,
    HALO: tl.constexpr,
):
    """rows[place(l, i)] = the sum (or mean) of x over entry (l, i), for BLOCK coarsest windows; reads x once.

    Args:
        p_x: tokens [chunks * length, D] of one batch element and head, `stride_x` apart.
        p_places: [pyramid length] int32 of that batch element and group.
        p_rows: rows [S, D], `stride_rows` apart.
        p_halo: where HALO, rows [chunks * (L-1), D] for the sums over entries (l, -1), `stride_halo` apart.
    """
    i_chunk, i_block, p_x = _chunk_of(p_x, stride_x, length, first, blocks)
    p_halo += (i_chunk * (L - 1)).to(tl.int64) * stride_halo
    i_window = i_block * BLOCK + tl.arange(0, BLOCK)
    i_d = tl.arange(0, BLOCK_D)
    m_d = (i_d < D)[None, :]
    sums = (tl.zeros([BLOCK, BLOCK_D], tl.float32),) * (L - 1)
    for i_part in range(P ** (L - 2)):
        i_unit = i_window * P ** (L - 2) + i_part
        tokens = ()
        for c in tl.static_range(P):
            i_token = i_unit * P + c - SHIFT
            m_token = ((i_token >= 0) & (i_token < length))[:, None]
            tokens += (tl.load(p_x + i_token.to(tl.int64)[:, None] * stride_x + i_d[None, :], mask=m_token & m_d, other=0.0),)
        unit = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        p_level = _level(p_places, i_chunk, length, chunks, 0, P)
        for c in tl.static_range(P):
            _emit(tokens[c], i_unit * P + c - SHIFT, p_level, p_rows, stride_rows, length, i_d, m_d, 0, P, False)
            unit += tokens[c].to(tl.float32)
        carried = ()
        for l in tl.static_range(1, L):
            total = sums[l - 1] + unit
            # the part that completes a window of level l stores it and starts the next
            complete = (i_part + 1) % P ** (l - 1) == 0
            i_entry = tl.where(complete, (i_unit + 1) // P ** (l - 1) - 1 - SHIFT, NONE)
            p_level = _level(p_places, i_chunk, length, chunks, l, P)
            _emit(total, i_entry, p_level, p_rows, stride_rows, length, i_d, m_d, l, P, MEAN)
            if HALO:
                p_out = p_halo + (l - 1) * stride_halo + i_d[None, :] + tl.zeros([BLOCK, 1], tl.int32)
                tl.store(p_out, total.to(p_halo.dtype.element_ty), mask=(i_entry == -1)[:, None] & m_d)
            carried += (tl.where(complete, 0.0, total),)
        sums = carried


@triton.jit
def _emit(x, i_entry, p_level, p_rows, stride_rows, length, i_d, m_d, LEVEL: tl.constexpr, P: tl.constexpr, MEAN: tl.constexpr):
    """Store the rows of entries that are gathered; those that lie outside of the chunk are not."""
    m_entry = (i_entry >= 0) & (i_entry < length // P**LEVEL)
    i_row = tl.load(p_level + i_entry, mask=m_entry, other=-1)
    if MEAN:
        x = x * (1.0 / P**LEVEL)
    p_out = p_rows + i_row.to(tl.int64)[:, None] * stride_rows + i_d[None, :]
    tl.store(p_out, x.to(p_rows.dtype.element_ty), mask=(i_row >= 0)[:, None] & m_d)


@triton.jit
def spread(
    p_rows,
    p_places,
    p_out,
    p_halo,
    stride_rows,
    stride_out,
    stride_halo,
    length,
    chunks,
    first,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    MEAN: tl.constexpr,
    HALO: tl.constexpr,
):
    """out[t] = the sum over levels of rows[place(l, (t + SHIFT) // p^l - SHIFT)] (over p^l), for BLOCK tokens.

    Args:
        p_rows: rows [S, D] of one batch element and head, `stride_rows` apart.
        p_places: as for `collect`.
        p_out: tokens [chunks * length, D], `stride_out` apart; every one is written.
        p_halo: where HALO, the rows [chunks * (L-1), D] of entries (l, -1), `stride_halo` apart.
    """
    i_chunk, i_block, p_out = _chunk_of(p_out, stride_out, length, first, blocks)
    p_halo += (i_chunk * (L - 1)).to(tl.int64) * stride_halo
    i_token = i_block * BLOCK + tl.arange(0, BLOCK)
    i_d = tl.arange(0, BLOCK_D)
    m_d = (i_d < D)[None, :]
    m_token = i_token < length
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for l in tl.static_range(L):
        # window 0 of the shifted positions belongs to no entry of this chunk
        i_window = (i_token + SHIFT) // P**l
        p_place = _level(p_places, i_chunk, length, chunks, l, P) + i_window - SHIFT
        i_row = tl.load(p_place, mask=m_token & (i_window >= SHIFT), other=-1)
        p_x = p_rows + i_row.to(tl.int64)[:, None] * stride_rows + i_d[None, :]
        x = tl.load(p_x, mask=(i_row >= 0)[:, None] & m_d, other=0.0).to(tl.float32)
        if HALO and l > 0:
            p_x = p_halo + (l - 1) * stride_halo + i_d[None, :] + tl.zeros([BLOCK, 1], tl.int32)
            x += tl.load(p_x, mask=(m_token & (i_window == 0))[:, None] & m_d, other=0.0).to(tl.float32)
        if MEAN:
            x = x * (1.0 / P**l)
        total += x
    p_token = p_out + i_token.to(tl.int64)[:, None] * stride_out + i_d[None, :]
    tl.store(p_token, total.to(p_out.dtype.element_ty), mask=m_token[:, None] & m_d)
