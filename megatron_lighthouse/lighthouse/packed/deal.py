"""Deal over documents: each gathered row to the rank that attends to it, and back to all ranks whose tokens it spills into.

Which rows a rank gathers depends on the scores, which rows it attends to does not: row x of the S rows of all documents is in
document zigzag, as their tokens are. All rows of all documents that pass between two ranks go in one message.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.transfer import Found, Transfer
from megatron_lighthouse.lighthouse.packed.shares import Shares
from megatron_lighthouse.lighthouse.packed.tables import SECTIONS, Tables, WayTables, tables_of
from megatron_lighthouse.lighthouse.selection import Selection


@dataclass(frozen=True)
class DocumentDeal:
    """Of one selection. What is found late, is found while the device gathers."""

    shares: Shares
    exchange: Exchange
    tables: Tables
    before: list[int]
    """Flags before each block of S / C of them (see `packed.tables`)."""

    @staticmethod
    def of(selection: Selection, shares: Shares, exchange: Exchange) -> DocumentDeal:
        """The deal of a selection among the whole row, which all ranks know.

        Waits for the device once: how much is sent must be known to the host. Messages of one size whatever is selected would
        be twenty times as long, and longer than those of attention: all that a tile refines may lie before the end of a chunk.
        """
        tables, before = tables_of(selection.places[0], shares)
        return DocumentDeal(shares, exchange, tables, before.tolist())

    @property
    def groups(self) -> int:
        return self.tables.gathered.shape[0]

    @cached_property
    def gathered(self) -> Selection:
        """The rows that this rank gathers, among the entries of its pieces."""
        return Selection(self.shares.pieces, self.tables.gathered.unsqueeze(0), self._most(0))

    @cached_property
    def scattered(self) -> Selection:
        """The rows that it scatters, likewise."""
        return Selection(self.shares.pieces, self.tables.scattered.unsqueeze(0), self._most(3))

    @cached_property
    def out(self) -> Transfer:
        """From the rank that gathers a row to the one that attends to it."""
        out = self.tables.out
        back_slots = out.back_slots[:, : self.gathered.length * self.groups]
        return self._transfer(out._replace(back_slots=back_slots), self._counts(0), self._counts(1))

    @cached_property
    def back(self) -> Transfer:
        """From there to those that scatter it."""
        back = self.tables.back
        slots = back.slots[:, : self.scattered.length * self.groups]
        return self._transfer(back._replace(slots=slots), self._counts(2), self._counts(3))

    def _transfer(self, way: WayTables, to: tuple[int, ...], by: tuple[int, ...]) -> Transfer:
        lists = way.leaving[: sum(to)], way.slots, (to, by), way.returning[: sum(by)], way.back_slots
        return Transfer(self.exchange, "deal", Found(*lists))

    def _counts(self, section: int) -> tuple[int, ...]:
        """Rows of each rank but this one."""
        (begin, each), blocks = SECTIONS[section], self.exchange.size * self.groups
        bounds = self.before[begin * blocks : (begin + each) * blocks + 1 : self.groups * each]
        return tuple((end - start) * (rank != self.exchange.rank) for rank, (start, end) in enumerate(pairwise(bounds)))

    def _most(self, section: int) -> int:
        """Rows of the group that has most; 1 at least."""
        (begin, each), blocks = SECTIONS[section], self.exchange.size * self.groups
        bounds = self.before[begin * blocks : (begin + each) * blocks + 1 : each]
        of_blocks = [end - start for start, end in pairwise(bounds)]
        return max(1, *(sum(of_blocks[group :: self.groups]) for group in range(self.groups)))

    def deal(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Rows as gathered, [·, 1, ·, D] each, to rows as attended to, [S filled up / C, 1, ·, D]; differentiable."""
        return self.out.of_groups(self.groups, *rows)

    def deal_back(self, rows: Tensor) -> Tensor:
        """Rows as attended to, [S filled up / C, 1, H, D], to rows as scattered, [·, 1, H, D]; differentiable."""
        return self.back.of_groups(self.groups, rows)[0]
