"""Deal over documents: each gathered row to the rank that attends to it, and back to all ranks whose tokens it spills into.

Which rows a rank gathers depends on the scores, which rows it attends to does not: row x of the S rows of all documents is in
document zigzag, as their tokens are. All rows of all documents that pass between two ranks go in one message.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.transfer import Queue, Transfer, Way
from megatron_lighthouse.lighthouse.packed.shares import Shares
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
        size, chunks, device = exchange.size, 2 * exchange.size, selection.places.device
        places, groups, attended = selection.places[0].long(), selection.places.shape[1], len(shares.own_rows)
        group = torch.arange(groups, device=device).unsqueeze(1)
        span = groups * shares.rows.tokens * chunks

        # of each entry of this rank's pieces: its row among all, and whether that is gathered or scattered here
        row = places[:, shares.entry_at]
        owns, wants = ((x & (row >= 0)) for x in (shares.owns, shares.wants))
        attends = shares.row_rank[row.clamp(min=0)]
        key = (group * shares.rows.tokens + row.clamp(min=0)) * chunks
        gathers = Queue.of(attends.where(owns, size), key, span, size)
        scatters = Queue.of(attends.where(wants, size), key + shares.chunks_at, span, size)

        # of each row that this rank attends to: the rank that gathers it, and the chunks that it spills into
        real = shares.own_rows < selection.length
        entry = selection.indices[0][:, shares.own_rows.clamp(max=selection.length - 1)]
        key = (group * shares.rows.tokens + shares.own_rows) * chunks
        comes = Queue.of(shares.owners[entry].where(real, size), key, span, size)
        chunk = shares.wanted[:, entry].long()
        target = torch.minimum(chunk, chunks - 1 - chunk).where((chunk >= 0) & real, size)
        goes = Queue.of(target, key + chunk.clamp(min=0), span, size)

        queues = (gathers, comes, goes, scatters)
        most = torch.stack([x.sum(1).max() for x in (owns, wants)])
        numbers = torch.cat([*(queue.counts for queue in queues), most]).tolist()
        counts = [numbers[i * size : (i + 1) * size] for i in range(len(queues))]
        gathered, scattered = (max(1, n) for n in numbers[-2:])
        number = torch.arange(attended, device=device) * groups + group
        copies = len(chunk)
        copy = torch.arange(copies, device=device).view(-1, 1, 1).expand_as(chunk)
        own, wanted = (x.cumsum(1) - 1 for x in (owns, wants))
        ends = (
            gathers.end(counts[0], own * groups + group, groups * gathered),
            comes.end(counts[1], number, groups * attended),
            goes.end(counts[2], number.expand_as(chunk), groups * attended, copy, copies),
            scatters.end(counts[3], wanted * groups + group, groups * scattered),
        )
        return DocumentDeal(
            Selection(shares.pieces, own.where(owns, -1).int().unsqueeze(0), gathered),
            Selection(shares.pieces, wanted.where(wants, -1).int().unsqueeze(0), scattered),
            Transfer(exchange, "deal", Way(ends[0], ends[1], exchange.rank)),
            Transfer(exchange, "deal", Way(ends[2], ends[3], exchange.rank)),
            groups,
        )

    def deal(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Rows as gathered, [·, 1, ·, D] each, to rows as attended to, [S filled up / C, 1, ·, D]; differentiable."""
        return self.out.of_groups(self.groups, *rows)

    def deal_back(self, rows: Tensor) -> Tensor:
        """Rows as attended to, [S filled up / C, 1, H, D], to rows as scattered, [·, 1, H, D]; differentiable."""
        return self.back.of_groups(self.groups, rows)[0]
