"""Selection per shard: each rank selects in its own chunks, or all decide alike about the tiles that span them.

Where the tiles lie within chunks (T is a multiple of 2C) nothing need be said to anyone. Where they do not, down to one tile
for the whole sequence, the ranks exchange the scores of their windows, the block summaries that selection decides by, in one
all-gather, and each decides everything; so their decisions are equal, and equal to those of one rank, to the last bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.geometry import Geometry, Pyramid
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.sharded.deal import Deal
from megatron_lighthouse.lighthouse.steps import Steps
from megatron_lighthouse.sequence.layout import Layout


def own_tiles(geometry: Geometry, size: int) -> Geometry | None:
    """The geometry of one rank's tiles where they are local; else None."""
    if not geometry.is_local(size):
        return None
    length, levels, pooling = geometry.pyramid
    return Geometry(length // size, levels, pooling, geometry.budget // size, geometry.tile_budget)


def select_shard(
    scores: Tensor,
    geometry: Geometry,
    own: Geometry | None,
    pin_first: bool,
    causal: bool,
    steps: Steps,
    exchange: Exchange,
) -> tuple[Selection, Deal | None]:
    """This rank's part of the selection that one rank would make.

    Args:
        scores: [2, B, G, coarse length] of this rank's tokens.
        geometry: of the whole sequence.
        own: as `own_tiles` gives it.

    Returns:
        The selection among this rank's tokens; and, where the ranks hold different numbers of rows, how these are dealt.
    """
    size, (length, levels, pooling) = exchange.size, geometry.pyramid
    if own is not None:
        return replace(steps.select(scores, own, pin_first and exchange.rank == 0, causal), chunks=2), None
    counts = [length // size for length in geometry.level_lengths[1:]]
    # [C, n, 2, B, G] a level, windows first, as `in_order` takes them
    shares = exchange.all_gather(scores.movedim(-1, 0), "select").split(counts, 1)
    whole = torch.cat([exchange.in_order(x) for x in shares]).movedim(0, -1).contiguous()
    selection = steps.select(whole, geometry, pin_first, causal)
    places, starts = _own_places(selection, exchange.layout)
    deal, spills = Deal.of(starts, geometry.gathered_length, exchange), None
    if selection.spills is not None:
        own_spills = [torch.cat(_own_chunks(x, exchange.layout), -1) for x in selection.by_level(selection.spills)]
        spills = places.where(torch.cat(own_spills, -1) >= 0, -1)
    return Selection(Pyramid(length // size, levels, pooling), places, deal.held, chunks=2, spills=spills), deal


def _own_places(selection: Selection, layout: Layout) -> tuple[Tensor, Tensor]:
    """The places of this rank's entries among its own rows, and the first row of every chunk: [B, G, 2C + 1], in all S rows.

    An entry's place in the whole sequence grows with its last token, so the rows of a chunk are a run of all rows.
    """
    early, late = layout.chunks
    counts = torch.stack([(x.unflatten(-1, (2 * layout.size, -1)) >= 0).sum(-1) for x in selection.rows]).sum(0)
    starts = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    first, second = starts[..., early, None], (starts[..., late] - counts[..., early]).unsqueeze(-1)
    own = []
    for x in selection.rows:
        a, b = _own_chunks(x, layout)
        own.append(torch.cat([a - first, b - second], -1).where(torch.cat([a, b], -1) >= 0, -1))
    return torch.cat(own, -1).int(), starts


def _own_chunks(level: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Of something of each entry of a level, that of this rank's two chunks."""
    early, late = layout.chunks
    by_chunk = level.unflatten(-1, (2 * layout.size, -1))
    return by_chunk[..., early, :], by_chunk[..., late, :]
