"""The two ways through the pyramid that gather and scatter share: collect tokens into rows, spread rows over tokens.

Both are written as gathers through the inverse map `places` (entry -> row, or -1), so nothing is added by atomics, every
element is written once, and each sum has one order. Windows are counted in positions t + SHIFT: with SHIFT = 0 entry
(l, i) holds the tokens of its window (gather), with SHIFT = 1 the positions that it spills to (scatter), for
[i*p^l + p^l - 1, i*p^l + 2*p^l - 2] is window i + 1 of the positions t + 1.

Tokens come in `chunks` of `length` each, and nothing crosses from one to the next: what spills past the end of a chunk belongs
to the chunk that follows in the whole sequence, and reaches it as its halo, the rows of the entries (l, -1). A launch works on
the `blocks` blocks of each chunk from `first` on. Of packed documents each is a chunk, of its own length: a lane has its
document's. Their levels from 1 on hold whole windows alone, and what is behind the last belongs to level 0 and to spills.

Rows may be turned while they are pooled (see `lighthouse.rotary`). Then a row is held as two tiles, one channel of each pair
in either, so that turning it moves nothing between threads; else it is one tile. See `kernels.lighthouse.tiles`.

Names: p_ pointers, i_ indices, m_ masks, stride_ strides in elements. Sums are in fp32, offsets of rows in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lighthouse.kernels.lighthouse.tiles import add, channels, load, scaled, store, turned, zeros

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
def _level(p_places, where, LEVEL: tl.constexpr, P: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr):
    """Where the entries of LEVEL of a chunk, or of each lane's document, begin; and how many there are."""
    if not PACKED:
        i_chunk, length, chunks = where
        entries = length // P**LEVEL
        return p_places + chunks * level_offset(length, LEVEL, P) + i_chunk * entries, entries
    elif LEVEL == 0:
        return p_places + where[0], where[1]
    else:
        _, _, before, windows, all_tokens, all_windows = where
        offset = all_tokens + before * P ** (L - 1 - LEVEL)
        for l in tl.static_range(1, LEVEL):
            offset += all_windows * P ** (L - 1 - l)
        return p_places + offset, windows * P ** (L - 1 - LEVEL)


@triton.jit
def documents_of(i_part, p_documents, documents, units, PARTS: tl.constexpr):
    """Of parts of units [BLOCK], PARTS a unit: the number of each in its document; where that begins, its tokens, and the
    windows before it and in it. A document has no tokens and no windows for parts that there are not.

    Args:
        p_documents: int32: the tokens, then the windows, then the rows before each of `documents` - 1 documents and after the
            last; then the document of each of `units` units, and its number in that. A document has a unit for every p^(L-1)
            tokens, a coarsest window, and one for the rest, which may be empty.
    """
    i_unit = i_part // PARTS
    m_unit = i_unit < units
    p_unit = p_documents + 3 * documents + i_unit
    p_of = p_documents + tl.load(p_unit, mask=m_unit, other=0)
    i_in = tl.load(p_unit + units, mask=m_unit, other=0) * PARTS + i_part % PARTS
    start, windows_before = tl.load(p_of), tl.load(p_of + documents)
    tokens = tl.where(m_unit, tl.load(p_of + 1) - start, 0)
    windows = tl.where(m_unit, tl.load(p_of + documents + 1) - windows_before, 0)
    return i_in, start, tokens, windows_before, windows


@triton.jit
def of_documents(p_x, stride, packed, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Of the lanes of this program, PARTS a unit: the number in the document, the document's tokens, where these begin, and
    what `_level` takes. `packed` is (p_documents, documents, units), as for `documents_of`, tokens and windows of all."""
    i_part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_in, start, tokens, before, windows = documents_of(i_part, packed[0], packed[1], packed[2], PARTS)
    return i_in, tokens, p_x + start.to(tl.int64)[:, None] * stride, (start, tokens, before, windows, packed[3], packed[4])


@triton.jit
def collect(
    p_x,
    p_places,
    p_rows,
    p_halo,
    p_turns,
    stride_x,
    stride_rows,
    stride_halo,
    length,
    chunks,
    first,
    blocks,
    is_turned,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    MEAN: tl.constexpr,
    HALO: tl.constexpr,
    TURN: tl.constexpr,
    PAIRS: tl.constexpr,
    BEFORE: tl.constexpr,
    packed=None,
    PACKED: tl.constexpr = False,
):
    """rows[place(l, i)] = the sum (or mean) of x over entry (l, i), for BLOCK coarsest windows; reads x once.

    Args:
        p_x: tokens [chunks * length, D] of one batch element and head, `stride_x` apart.
        p_places: [pyramid length] int32 of that batch element and group.
        p_rows: rows [S, D], `stride_rows` apart.
        p_halo: where HALO, rows [chunks * (L-1), D] for the sums over entries (l, -1), `stride_halo` apart.
        p_turns: where TURN, [P**(L-1), 2, PAIRS]: by how much a row is turned on by so many tokens; only if `is_turned`.
        packed: where PACKED, the documents that stand for chunks: see `of_documents`.
    """
    if PACKED:
        i_window, length, p_x, where = of_documents(p_x, stride_x, packed, BLOCK, 1)
    else:
        i_chunk, i_block, p_x = _chunk_of(p_x, stride_x, length, first, blocks)
        p_halo += (i_chunk * (L - 1)).to(tl.int64) * stride_halo
        i_window = i_block * BLOCK + tl.arange(0, BLOCK)
        where = i_chunk, length, chunks
    i_d = channels(D, BLOCK_D, TURN, PAIRS, BEFORE)
    turns = (i_d[4], is_turned)
    sums = zeros(BLOCK, BLOCK_D, L - 1, TURN)
    TILES: tl.constexpr = 2 if TURN else 1
    for i_part in range(P ** (L - 2)):
        i_unit = i_window * P ** (L - 2) + i_part
        tokens = ()
        for c in tl.static_range(P):
            i_token = i_unit * P + c - SHIFT
            m_token = ((i_token >= 0) & (i_token < length))[:, None]
            tokens += load(p_x + i_token.to(tl.int64)[:, None] * stride_x, i_d, m_token, BLOCK, BLOCK_D, TURN)
        unit = zeros(BLOCK, BLOCK_D, 1, TURN)
        p_level, entries = _level(p_places, where, 0, P, L, PACKED)
        for c in tl.static_range(P):
            token = tokens[c * TILES : (c + 1) * TILES]
            i_entry = i_unit * P + c - SHIFT
            _emit(token, i_entry, p_level, p_rows, stride_rows, entries, i_d, BLOCK, BLOCK_D, 0, P, False, TURN)
            if TURN and c < P - 1:  # on to the last token of the unit
                token = turned(token, turns, p_turns + (P - 1 - c) * 2 * PAIRS, False, PAIRS)
            unit = add(unit, token, TURN)
        carried = ()
        for l in tl.static_range(1, L):
            part = unit
            if TURN and l > 1:  # on to the last token of the window of level l
                units_behind = P ** (l - 1) - 1 - i_part % P ** (l - 1)
                part = turned(unit, turns, p_turns + units_behind * P * 2 * PAIRS, False, PAIRS)
            total = add(sums[(l - 1) * TILES : l * TILES], part, TURN)
            # the part that completes a window of level l stores it and starts the next
            complete = (i_part + 1) % P ** (l - 1) == 0
            i_entry = tl.where(complete, (i_unit + 1) // P ** (l - 1) - 1 - SHIFT, NONE)
            p_level, entries = _level(p_places, where, l, P, L, PACKED)
            _emit(total, i_entry, p_level, p_rows, stride_rows, entries, i_d, BLOCK, BLOCK_D, l, P, MEAN, TURN)
            if HALO:
                p_out = p_halo + (l - 1) * stride_halo + tl.zeros([BLOCK, 1], tl.int32)
                store(p_out, total, i_d, (i_entry == -1)[:, None], BLOCK, BLOCK_D, TURN)
            for tile in tl.static_range(TILES):
                carried += (tl.where(complete, 0.0, total[tile]),)
        sums = carried


@triton.jit
def _emit(
    x,
    i_entry,
    p_level,
    p_rows,
    stride_rows,
    entries,
    i_d,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEVEL: tl.constexpr,
    P: tl.constexpr,
    MEAN: tl.constexpr,
    TURN: tl.constexpr,
):
    """Store the rows of entries that are gathered; those that lie outside of the chunk are not."""
    m_entry = (i_entry >= 0) & (i_entry < entries)
    i_row = tl.load(p_level + i_entry, mask=m_entry, other=-1)
    if MEAN:
        x = scaled(x, 1.0 / P**LEVEL, TURN)
    store(p_rows + i_row.to(tl.int64)[:, None] * stride_rows, x, i_d, (i_row >= 0)[:, None], BLOCK, BLOCK_D, TURN)


@triton.jit
def spread(
    p_rows,
    p_places,
    p_out,
    p_halo,
    p_turns,
    stride_rows,
    stride_out,
    stride_halo,
    length,
    chunks,
    first,
    blocks,
    is_turned,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    MEAN: tl.constexpr,
    HALO: tl.constexpr,
    TURN: tl.constexpr,
    PAIRS: tl.constexpr,
    BEFORE: tl.constexpr,
    packed=None,
    PACKED: tl.constexpr = False,
):
    """out[t] = the sum over levels of rows[place(l, (t + SHIFT) // p^l - SHIFT)] (over p^l), for BLOCK windows of level 1.

    What a window of level 1 gets from the coarser levels is summed once, and then goes to each of its tokens.

    Args:
        p_rows: rows [S, D] of one batch element and head, `stride_rows` apart.
        p_places, p_turns: as for `collect`; rows are turned back.
        p_out: tokens [chunks * length, D], `stride_out` apart; every one is written.
        p_halo: where HALO, the rows [chunks * (L-1), D] of entries (l, -1), `stride_halo` apart.
        packed: as for `collect`.
    """
    if PACKED:
        i_unit, length, p_out, where = of_documents(p_out, stride_out, packed, BLOCK, P ** (L - 2))
    else:
        i_chunk, i_block, p_out = _chunk_of(p_out, stride_out, length, first, blocks)
        p_halo += (i_chunk * (L - 1)).to(tl.int64) * stride_halo
        i_unit = i_block * BLOCK + tl.arange(0, BLOCK)
        where = i_chunk, length, chunks
    i_d = channels(D, BLOCK_D, TURN, PAIRS, BEFORE)
    turns = (i_d[4], is_turned)
    coarse = zeros(BLOCK, BLOCK_D, 1, TURN)
    for l in tl.static_range(L - 1, 0, -1):
        # window 0 of the shifted positions belongs to no entry of this chunk
        i_window = i_unit // P ** (l - 1)
        p_level, entries = _level(p_places, where, l, P, L, PACKED)
        m_window = (i_window >= SHIFT) & (i_window - SHIFT < entries)
        i_row = tl.load(p_level + i_window - SHIFT, mask=m_window, other=-1)
        p_x = p_rows + i_row.to(tl.int64)[:, None] * stride_rows
        x = load(p_x, i_d, (i_row >= 0)[:, None], BLOCK, BLOCK_D, TURN)
        if HALO:
            p_x = p_halo + (l - 1) * stride_halo + tl.zeros([BLOCK, 1], tl.int32)
            x = add(x, load(p_x, i_d, (i_window == 0)[:, None], BLOCK, BLOCK_D, TURN), TURN)
        if TURN and l > 1:  # back to the last token of the unit
            units_behind = P ** (l - 1) - 1 - i_unit % P ** (l - 1)
            x = turned(x, turns, p_turns + units_behind[:, None] * (P * 2 * PAIRS), True, PAIRS)
        if MEAN:
            x = scaled(x, 1.0 / P**l, TURN)
        coarse = add(coarse, x, TURN)
    p_level, _ = _level(p_places, where, 0, P, L, PACKED)
    for c in tl.static_range(P):
        i_token = i_unit * P + c - SHIFT
        m_token = (i_token >= 0) & (i_token < length)
        i_row = tl.load(p_level + i_token, mask=m_token, other=-1)
        p_x = p_rows + i_row.to(tl.int64)[:, None] * stride_rows
        part = coarse
        if TURN and c < P - 1:  # back to this token
            part = turned(coarse, turns, p_turns + (P - 1 - c) * 2 * PAIRS, True, PAIRS)
        total = add(load(p_x, i_d, (i_row >= 0)[:, None], BLOCK, BLOCK_D, TURN), part, TURN)
        p_token = p_out + i_token.to(tl.int64)[:, None] * stride_out
        store(p_token, total, i_d, m_token[:, None], BLOCK, BLOCK_D, TURN)
