"""Deal: the gathered rows of ranks that hold different numbers of them, dealt evenly before attention and back after.

Row x of the S rows of a batch element and selection (a key/value head's, or that of several) lies on the rank that holds its
entry's chunk, and is attended to on the rank that holds chunk x // (S / 2C) of the rows. All rows that pass between two ranks
go in one message, of each dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.transfer import Between, End, Transfer
from megatron_lighthouse.sequence.layout import Layout


@dataclass(frozen=True)
class Deal:
    """Who sends which rows to whom, for one selection."""

    held: int
    """Rows that this rank holds at most, over batch elements and key/value heads."""
    out: Transfer
    """From rows as gathered to rows as attended to, S/C, both numbered (row * B + b) * G + g."""
    back: Transfer

    @staticmethod
    def of(starts: Tensor, gathered_length: int, exchange: Exchange) -> Deal:
        """The deal of `gathered_length` (S) rows, of which chunk c holds those from starts[..., c] to starts[..., c + 1].

        Args:
            starts: [B, G, 2C + 1] int64. Waits for the device once: how much is sent must be known to the host.
        """
        size, (early, late) = exchange.size, exchange.layout.chunks
        share = gathered_length // (2 * size)
        counts = starts.diff(dim=-1)
        own = counts[..., early] + counts[..., late]
        table = torch.cat([counts.flatten(), own.max().unsqueeze(0)]).tolist()
        held, device = table.pop(), starts.device
        row = torch.arange(held, device=device).expand(*starts.shape[:2], -1)
        in_early = row < counts[..., early, None]
        number = torch.where(in_early, row + starts[..., early, None], row - counts[..., early, None] + starts[..., late, None])
        target = number // share
        target = torch.minimum(target, 2 * size - 1 - target)
        target = target.where(row < own.unsqueeze(-1), size)  # behind the last rank: rows that are not there
        place = torch.arange(2 * share, device=device).expand(*starts.shape[:2], -1)
        number = torch.where(place < share, place + early * share, place - share + late * share)
        source = torch.searchsorted(starts[..., 1:].contiguous(), number.contiguous(), right=True)
        source = torch.minimum(source, 2 * size - 1 - source)
        to, by = _rows_between(table, size, share, exchange.rank)
        way = Between(_end(target, to), _end(source, by), exchange.rank)
        return Deal(held, Transfer(exchange, "deal", way), Transfer(exchange, "deal", way.back))


def _end(partner: Tensor, counts: tuple[int, ...]) -> End:
    """Of the rows [B, G, rows] that travel to or from rank `partner`, or not at all behind the last."""
    batch, groups, rows = partner.shape
    order = partner.flatten().argsort(stable=True)[: sum(counts)]
    return End(order % rows * (batch * groups) + order // rows, counts, partner.numel())


def _rows_between(counts: list[int], size: int, share: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows that `rank` sends to each rank, and receives from each, from the rows of each chunk (by batch element and head)."""
    to, by, holder = [0] * size, [0] * size, Layout(size, rank).owner
    for at in range(0, len(counts), 2 * size):
        start = 0
        for chunk, count in enumerate(counts[at : at + 2 * size]):
            for target in range(start // share, -(-(start + count) // share)):
                rows = min(start + count, (target + 1) * share) - max(start, target * share)
                if holder(chunk) == rank:
                    to[holder(target)] += rows
                if holder(target) == rank:
                    by[holder(chunk)] += rows
            start += count
    return tuple(to), tuple(by)
