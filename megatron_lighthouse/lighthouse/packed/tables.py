"""Tables of a deal over documents: where each row of one selection is gathered, attended to and scattered, found by all ranks.

Each thing that a rank does with a row has a flag, in one list of four sections:

    gathers   the rows that this rank gathers, by the rank that attends to them
    comes     the rows that it attends to, by the rank that gathers them
    goes      these, by the rank that scatters them, twice: over its early and over its late chunk
    scatters  the rows that it scatters, by the rank that attends to them, twice likewise

A section has a block for each rank, in it one for each group, and in that a place for each row that a rank attends to, in the
order in which it does. So the flags before one (one sum over all of them) say where in the message of that rank its row is, and
both ends find the same.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lighthouse.gpu import triton_takes
from megatron_lighthouse.lighthouse.packed.shares import Shares

SECTIONS = ((0, 1), (1, 1), (2, 2), (4, 2))
"""Of gathers, comes, goes and scatters: flags before them, in sections of one flag a row; flags of a row."""
FLAGS = 6
"""Of a row, in all sections."""


class WayTables(NamedTuple):
    """Of a way and the way back, as `transfer.Found` has them; lists have room for as many rows as there can be."""

    leaving: Tensor
    slots: Tensor
    returning: Tensor
    back_slots: Tensor


@dataclass(frozen=True)
class Tables:
    """All int32, and -1 where nothing is. Rows are numbered row * G + g, as `Transfer.of_groups` does."""

    gathered: Tensor
    """[G, entries of the pieces]: the row of each entry that this rank gathers."""
    scattered: Tensor
    """[G, entries of the pieces]: the row of each entry that it scatters."""
    out: WayTables
    """From the rows that it gathers to those that it attends to."""
    back: WayTables
    """From there to those that it scatters."""

    @staticmethod
    def empty(shares: Shares, groups: int) -> Tables:
        """With room for any selection."""
        size, places = _room(shares, groups)
        memory = torch.full((size,), -1, dtype=torch.int32, device=shares.device)
        gathers, scatters, *lists = (memory.as_strided(*place) for place in places)
        return Tables(gathers, scatters, WayTables(*lists[:4]), WayTables(*lists[4:]))


Place = tuple[tuple[int, ...], tuple[int, ...], int]
"""Where a table lies: shape, strides, and the first of its elements."""


def _room(shares: Shares, groups: int) -> tuple[int, list[Place]]:
    """What tables take together, and where each lies; made once for all layers."""
    made: dict[int, tuple[int, list[Place]]] = vars(shares).setdefault("room", {})
    if groups not in made:
        rows, own, pieces = len(shares.row_at), groups * len(shares.own_rows), shares.pieces.pyramid_length
        gathered, scattered, copies = groups * min(rows, pieces), groups * min(2 * rows, pieces), shares.copies
        shapes: list[tuple[int, ...]] = [(groups, pieces), (groups, pieces)]
        shapes += [(gathered,), (1, own), (own,), (1, gathered), (copies * own,), (1, scattered), (scattered,), (copies, own)]
        begins = [0, *accumulate(-(-prod(shape) // 4) * 4 for shape in shapes)]  # all aligned to 16 bytes
        strides = [(shape[-1], 1)[-len(shape) :] for shape in shapes]
        made[groups] = begins[-1], list(zip(shapes, strides, begins[:-1], strict=True))
    return made[groups]


def tables_of(places: Tensor, shares: Shares) -> tuple[Tables, Tensor]:
    """The tables, and [6 * C * G + 1] int32: flags before each S / C of them.

    Args:
        places: [G, entries of the row] int32: the row of each entry, or -1.
    """
    tables = Tables.empty(shares, len(places))
    size = FLAGS * len(places) * len(shares.row_at)
    flags = torch.zeros(size + 1, dtype=torch.int32, device=places.device)
    steps: Any = sys.modules[__name__]
    if triton_takes(places):
        from megatron_lighthouse.kernels.lighthouse.packed import deal as steps
    steps.fill_flags(flags[1:], places, shares)
    before = flags.cumsum(0, dtype=torch.int32)
    steps.fill_tables(tables, before, places, shares)
    return tables, before[:: len(shares.own_rows)]


class _Rows:
    """The rows of a selection, in plain PyTorch; [rows] or [copies, rows] int64 each, as broadcast."""

    def __init__(self, places: Tensor, shares: Shares) -> None:
        self.rank, self.size = shares.layout.rank, shares.layout.size
        self.groups, self.share = len(places), len(shares.own_rows)
        self.group, self.entry = (places >= 0).nonzero(as_tuple=True)
        at = shares.row_at[places[self.group, self.entry]].long()
        self.attends, self.place = at // self.share, at % self.share
        self.gathers, chunk = shares.owners[self.entry].long(), shares.wanted[:, self.entry].long()
        self.late, self.scatters = (chunk >= self.size).long(), torch.minimum(chunk, 2 * self.size - 1 - chunk)
        here = self.attends == self.rank
        self.partners = self.attends, self.gathers, self.scatters.clamp(min=0), self.attends
        self.flagged = self.gathers == self.rank, here, here & (chunk >= 0), self.scatters == self.rank

    def flag(self, section: int) -> Tensor:
        """Which flag is that of each row, where it is set."""
        begin, each = SECTIONS[section]
        late = self.late if each == 2 else 0
        block = self.partners[section] * self.groups + self.group
        return (begin * self.size * self.groups + block * each) * self.share + self.place * each + late

    def message(self, section: int, before: Tensor) -> Tensor:
        """Which row it is of all that pass between this and other ranks."""
        begin, each = SECTIONS[section]
        starts = before[begin * self.size * self.groups * self.share :: self.groups * self.share * each]
        own = (starts[self.rank + 1] - starts[self.rank]).where(self.partners[section] > self.rank, 0)
        return before[self.flag(section)] - starts[0] - own

    def number(self, section: int, before: Tensor) -> Tensor:
        """Which row of its group it is, of those of this section."""
        begin, each = SECTIONS[section]
        starts = before[begin * self.size * self.groups * self.share :: self.share * each][: self.size * self.groups + 1]
        counts = starts.diff().view(self.size, self.groups)
        earlier = starts[:-1].view_as(counts) - (counts.cumsum(0) - counts)
        return before[self.flag(section)] - earlier[self.partners[section], self.group]


def fill_flags(flags: Tensor, places: Tensor, shares: Shares) -> None:
    """Set the flags of a selection among `flags`, all zero."""
    rows = _Rows(places, shares)
    for section, flagged in enumerate(rows.flagged):
        flags[rows.flag(section)[flagged]] = 1


def fill_tables(tables: Tables, before: Tensor, places: Tensor, shares: Shares) -> None:
    """Fill the tables; `before`: [flags + 1] int32, the flags set before each."""
    rows = _Rows(places, shares)
    gathered, scattered = (rows.number(section, before) for section in (0, 3))
    sent = [rows.message(section, before) for section in range(len(SECTIONS))]
    copies = torch.arange(len(rows.late), device=places.device).unsqueeze(1)
    attended = (rows.place * rows.groups + rows.group).int()
    copy = copies * (rows.groups * rows.share) + attended

    def fill(table: Tensor, where: Tensor, values: Tensor, flagged: Tensor) -> None:
        table.view(-1)[where.expand_as(flagged)[flagged].long()] = values.expand_as(flagged)[flagged].int()

    def fill_way(leaving: Tensor, slots: Tensor, section: int, row: Tensor, place: Tensor, other: Tensor) -> None:
        """Of one end: `row` is at `place` here, and is `other` at the other end where that is here too."""
        flagged, away = rows.flagged[section], rows.partners[section] != rows.rank
        fill(leaving, sent[section], row, flagged & away)
        fill(slots, place, torch.where(away, -2 - sent[section], other), flagged)

    own, wanted = (number * rows.groups + rows.group for number in (gathered, scattered))
    by_group = rows.group * shares.pieces.pyramid_length
    fill(tables.gathered, by_group + shares.gathers_at[rows.entry], gathered, rows.flagged[0])
    fill(tables.scattered, by_group + shares.scatters_at[rows.late, rows.entry], scattered, rows.flagged[3])
    fill_way(tables.out.leaving, tables.out.back_slots, 0, own, own, attended)
    fill_way(tables.out.returning, tables.out.slots, 1, attended, attended, own)
    fill_way(tables.back.leaving, tables.back.back_slots, 2, attended, copy, wanted)
    fill_way(tables.back.returning, tables.back.slots, 3, wanted, wanted, attended)
