"""The tables of a deal over documents as Triton kernels: see `megatron_lighthouse.lighthouse.packed.tables`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue
from megatron_lighthouse.lighthouse.packed.shares import Shares
from megatron_lighthouse.lighthouse.packed.tables import Tables

COUNTS = ["entries", "pieces", "share", "rank", "size"]
"""Numbers that change from row to row, or from rank to rank."""
BLOCK = 256


@triton.jit
def _rows_of(p_places, p_row_at, p_owners, entries, share, BLOCK: tl.constexpr):
    """Of the entries of this program: which are rows; the ranks that attend to these and that gather them; and, for flags, the
    number of each among the rows that its rank attends to."""
    i_entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(p_places + tl.program_id(1).to(tl.int64) * entries + i_entry, mask=i_entry < entries, other=-1)
    m_row = row >= 0
    at = tl.load(p_row_at + row, mask=m_row, other=0)
    owner = tl.load(p_owners + i_entry, mask=m_row, other=0).to(tl.int32)
    return i_entry, m_row, at // share, owner, at % share


@triton.jit
def _scattering(p_wanted, i_entry, m_row, size):
    """Of a copy of each row: whether it is there, the rank that scatters it, and whether that is over its late chunk."""
    chunk = tl.load(p_wanted + i_entry, mask=m_row, other=-1).to(tl.int32)
    return chunk >= 0, tl.minimum(chunk, 2 * size - 1 - chunk), (chunk >= size).to(tl.int32)


@triton.jit
def _flag(BEGIN: tl.constexpr, EACH: tl.constexpr, size, share, partner, i_own, late):
    """The flag of a row in the block of rank `partner`, of a section (see `tables.SECTIONS`)."""
    groups, i_g = tl.num_programs(1).to(tl.int64), tl.program_id(1)
    return BEGIN * size * groups * share + ((partner * groups + i_g) * share + i_own) * EACH + late


@triton.jit
def _message(p_before, BEGIN: tl.constexpr, EACH: tl.constexpr, rank, size, share, partner, i_flag, m_flag):
    """See `tables._Rows.message`."""
    block = tl.num_programs(1).to(tl.int64) * share * EACH
    p_start = p_before + BEGIN // EACH * size * block
    p_own = p_start + rank * block
    own = tl.load(p_own + block) - tl.load(p_own)
    return tl.load(p_before + i_flag, mask=m_flag, other=0) - tl.load(p_start) - tl.where(partner > rank, own, 0)


@triton.jit
def _number(p_before, BEGIN: tl.constexpr, EACH: tl.constexpr, size, share, partner, i_flag, m_flag):
    """See `tables._Rows.number`."""
    block, groups = share * EACH, tl.num_programs(1).to(tl.int64)
    p_block = p_before + (BEGIN // EACH * size * groups + tl.program_id(1)) * block
    start = tl.load(p_block + partner * groups * block, mask=m_flag, other=0)
    number = tl.load(p_before + i_flag, mask=m_flag, other=0) - start
    for other in range(size):
        count = tl.load(p_block + block) - tl.load(p_block)
        number += tl.where(other < partner, count, 0)
        p_block += groups * block
    return number


@triton.jit
def _store(p_leaving, p_slots, i_message, i_row, i_slot, i_other, is_away, m_flag):
    """Of one end: row `i_row` has the slot `i_slot`, and is `i_other` at the other end where that is here too."""
    tl.store(p_leaving + i_message, i_row.to(tl.int32), mask=m_flag & is_away)
    tl.store(p_slots + i_slot, tl.where(is_away, -2 - i_message, i_other.to(tl.int32)), mask=m_flag)


@triton.jit(repr=lambda _: "lighthouse_packed_deal_flags", do_not_specialize=COUNTS)
def flags_kernel(
    p_places,
    p_row_at,
    p_owners,
    p_wanted,
    p_flags,
    entries,
    share,
    rank,
    size,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of entries, g). `p_flags` is that behind the first, where the sum begins."""
    i_entry, m_row, attends, owner, i_own = _rows_of(p_places, p_row_at, p_owners, entries, share, BLOCK)
    one, is_here = tl.full([BLOCK], 1, tl.int32), attends == rank
    tl.store(p_flags + _flag(0, 1, size, share, attends, i_own, 0), one, mask=m_row & (owner == rank))
    tl.store(p_flags + _flag(1, 1, size, share, owner, i_own, 0), one, mask=m_row & is_here)
    for _ in tl.static_range(COPIES):
        m_copy, target, late = _scattering(p_wanted, i_entry, m_row, size)
        tl.store(p_flags + _flag(2, 2, size, share, target, i_own, late), one, mask=m_copy & is_here)
        tl.store(p_flags + _flag(4, 2, size, share, attends, i_own, late), one, mask=m_copy & (target == rank))
        p_wanted += entries


@triton.jit(repr=lambda _: "lighthouse_packed_deal_tables", do_not_specialize=COUNTS)
def tables_kernel(
    p_places,
    p_row_at,
    p_owners,
    p_wanted,
    p_gathers_at,
    p_scatters_at,
    p_before,
    p_gathered,
    p_scattered,
    p_out_leaving,
    p_out_slots,
    p_out_returning,
    p_out_back_slots,
    p_back_leaving,
    p_back_slots,
    p_back_returning,
    p_back_back_slots,
    entries,
    pieces,
    share,
    rank,
    size,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of entries, g)."""
    groups, i_g = tl.num_programs(1).to(tl.int64), tl.program_id(1)
    i_entry, m_row, attends, owner, i_own = _rows_of(p_places, p_row_at, p_owners, entries, share, BLOCK)
    p_gathered += i_g.to(tl.int64) * pieces
    p_scattered += i_g.to(tl.int64) * pieces
    is_here, attended = attends == rank, i_own * groups + i_g

    i_flag, m_flag = _flag(0, 1, size, share, attends, i_own, 0), m_row & (owner == rank)
    number = _number(p_before, 0, 1, size, share, attends, i_flag, m_flag)
    tl.store(p_gathered + tl.load(p_gathers_at + i_entry, mask=m_flag, other=0), number, mask=m_flag)
    row = number * groups + i_g
    i_message = _message(p_before, 0, 1, rank, size, share, attends, i_flag, m_flag)
    _store(p_out_leaving, p_out_back_slots, i_message, row, row, attended, attends != rank, m_flag)

    i_flag, m_flag = _flag(1, 1, size, share, owner, i_own, 0), m_row & is_here
    i_message = _message(p_before, 1, 1, rank, size, share, owner, i_flag, m_flag)
    _store(p_out_returning, p_out_slots, i_message, attended, attended, row, owner != rank, m_flag)

    for _ in tl.static_range(COPIES):
        m_copy, target, late = _scattering(p_wanted, i_entry, m_row, size)
        i_flag, m_flag = _flag(4, 2, size, share, attends, i_own, late), m_copy & (target == rank)
        number = _number(p_before, 4, 2, size, share, attends, i_flag, m_flag)
        i_piece = tl.load(p_scatters_at + late * entries + i_entry, mask=m_flag, other=0)
        tl.store(p_scattered + i_piece, number, mask=m_flag)
        row = number * groups + i_g
        i_message = _message(p_before, 4, 2, rank, size, share, attends, i_flag, m_flag)
        _store(p_back_returning, p_back_slots, i_message, row, row, attended, attends != rank, m_flag)

        i_flag, m_flag = _flag(2, 2, size, share, target, i_own, late), m_copy & is_here
        i_message = _message(p_before, 2, 2, rank, size, share, target, i_flag, m_flag)
        _store(p_back_leaving, p_back_back_slots, i_message, attended, attended, row, target != rank, m_flag)
        p_wanted += entries
        p_back_back_slots += groups * share


def fill_flags(flags: Tensor, places: Tensor, shares: Shares) -> None:
    """See `tables.fill_flags`."""
    groups, entries = places.shape
    enqueue(
        flags_kernel,
        (cdiv(entries, BLOCK), groups, 1),
        (places, shares.row_at, shares.owners, shares.wanted, flags),
        (entries, len(shares.own_rows), shares.layout.rank, shares.layout.size),
        {"COPIES": shares.copies, "BLOCK": BLOCK},
        num_warps=4,
    )


def fill_tables(tables: Tables, before: Tensor, places: Tensor, shares: Shares) -> None:
    """See `tables.fill_tables`."""
    groups, entries = places.shape
    of_rows = (places, shares.row_at, shares.owners, shares.wanted, shares.gathers_at, shares.scatters_at)
    enqueue(
        tables_kernel,
        (cdiv(entries, BLOCK), groups, 1),
        (*of_rows, before, tables.gathered, tables.scattered, *tables.out, *tables.back),
        (entries, tables.gathered.shape[1], len(shares.own_rows), shares.layout.rank, shares.layout.size),
        {"COPIES": shares.copies, "BLOCK": BLOCK},
        num_warps=4,
    )
