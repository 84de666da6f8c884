"""Deal over documents: each gathered row to the rank that attends to it, and back to all ranks whose tokens it spills into.

Which rows a rank gathers depends on the scores, which rows it attends to does not: row x of the S rows of all documents is in
document zigzag, as their tokens are. All rows of all documents that pass between two ranks go in one message.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.transfer import Found, Transfer
from megatron_lighthouse.lighthouse.packed.shares import Shares
from megatron_lighthouse.lighthouse.packed.tables import SECTIONS, WayTables, tables_of
from megatron_lighthouse.lighthouse.selection import Selection


@dataclass(frozen=True)
class DocumentDeal:
    """Of one selection."""

    gathered: Selection
    """The rows that this rank gathers, among the entries of its pieces."""
    scattered: Selection
    """The rows that it scatters, likewise."""
    out: Transfer
    """From the rank that gathers a row to the one that attends to it."""
    back: Transfer
    """From there to those that scatter it."""
    groups: int

    @staticmethod
    def of(selection: Selection, shares: Shares, exchange: Exchange) -> DocumentDeal:
        """The deal of a selection among the whole row, which all ranks know.

        Waits for the device once: how much is sent must be known to the host.
        """
        size, groups = exchange.size, selection.places.shape[1]
        tables, before = tables_of(selection.places[0], shares)
        flags, blocks = numpy.diff(before.tolist()), size * groups
        gathers, comes, goes, scatters = (
            flags[begin * blocks : (begin + each) * blocks].reshape(size, groups, each).sum(2) for begin, each in SECTIONS
        )
        gathered, scattered = (max(1, int(found.sum(0).max())) for found in (gathers, scatters))

        def transfer(found: WayTables, to: numpy.ndarray, by: numpy.ndarray) -> Transfer:
            others = numpy.arange(size) != exchange.rank
            goes, comes = (tuple((x.sum(1) * others).tolist()) for x in (to, by))
            lists = found.leaving[: sum(goes)], found.slots, (goes, comes), found.returning[: sum(comes)], found.back_slots
            return Transfer(exchange, "deal", Found(*lists))

        out = tables.out._replace(back_slots=tables.out.back_slots[:, : gathered * groups])
        back = tables.back._replace(slots=tables.back.slots[:, : scattered * groups])
        return DocumentDeal(
            Selection(shares.pieces, tables.gathered.unsqueeze(0), gathered),
            Selection(shares.pieces, tables.scattered.unsqueeze(0), scattered),
            transfer(out, gathers, comes),
            transfer(back, goes, scatters),
            groups,
        )

    def deal(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Rows as gathered, [·, 1, ·, D] each, to rows as attended to, [S filled up / C, 1, ·, D]; differentiable."""
        return self.out.of_groups(self.groups, *rows)

    def deal_back(self, rows: Tensor) -> Tensor:
        """Rows as attended to, [S filled up / C, 1, H, D], to rows as scattered, [·, 1, H, D]; differentiable."""
        return self.back.of_groups(self.groups, rows)[0]
