"""Which tokens travel to the rank that owns their window, in a row of documents: found by runs of them. Integers alone.

Of a rank's chunk of a document the tokens of windows that end in it stay, and so do those in no window. Those after the last
such window go to the rank in whose chunk the next one ends. What a rank has of a window before its own chunk comes from the
ranks of the chunks before that. Both ends list tokens by the rank at the other end, then in the order of the row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.packed.packing import bounds_of
from megatron_lighthouse.lighthouse.packed.pieces import Cut
from megatron_lighthouse.sequence.documents import runs
from megatron_lighthouse.sequence.layout import Layout

Moved = tuple[Tensor, tuple[int, ...], int]
"""The numbers of tokens that travel, in order; of these, to or from each rank; and how many tokens there are on this end."""


def leaving(cut: Cut, owner: Tensor, layout: Layout) -> Moved:
    """This rank's tokens, as it holds them.

    Args:
        owner: [W], the chunk whose rank owns each coarsest window of the row.
    """
    _, _, owned, loose, end, _ = cut.edges
    owned = torch.maximum(owned, cut.begin)  # what is before the chunk is held elsewhere
    edges = torch.stack([cut.begin, owned, loose, end])
    window = cut.maps.windows[cut.document] + owned // cut.pieces.rule.window
    # after the last window, and in whole documents, there is none that tokens could go to
    next_owner = torch.cat([owner, owner.new_zeros(1)])[window.clamp(max=len(owner))].long()
    here = torch.full_like(next_owner, layout.rank)
    ranks = torch.stack([here, torch.minimum(next_owner, 2 * layout.size - 1 - next_owner), here])
    held = bounds_of(end - cut.begin).long()
    return _moved(edges[:-1] + (held[:-1] - cut.begin), edges.diff(dim=0), ranks, cut.document, layout, int(held[-1]))


def arriving(cut: Cut, sizes: Tensor, layout: Layout) -> Moved:
    """The tokens of this rank's pieces.

    Args:
        sizes: [2C, n], tokens of each chunk of each document.
    """
    start, first, owned, loose, end, _ = cut.edges
    kept = torch.minimum(torch.maximum(first, cut.begin), owned)  # of its own windows, from here on in its own chunk
    chunk = torch.arange(len(sizes)).unsqueeze(1)
    edges = sizes.cumsum(0)[:, cut.document]
    ends = torch.cat([torch.maximum(torch.minimum(edges, kept), first), owned.unsqueeze(0)])
    begins = torch.cat([first.unsqueeze(0), ends[:-1]])
    ranks = torch.minimum(chunk, len(sizes) - 1 - chunk).expand(-1, len(start))
    here = torch.full_like(start, layout.rank).unsqueeze(0)
    begins, ends = torch.cat([begins, loose.unsqueeze(0)]), torch.cat([ends, end.unsqueeze(0)])
    shift = cut.bounds[:-1] - start
    return _moved(begins + shift, ends - begins, torch.cat([ranks, here, here]), cut.document, layout, cut.pieces.seq_length)


def _moved(begins: Tensor, sizes: Tensor, ranks: Tensor, document: Tensor, layout: Layout, length: int) -> Moved:
    """Of [runs, pieces] each, in the order of the row in every piece."""
    in_order = document.argsort(stable=True)
    begins, sizes, ranks = (x[:, in_order].t().flatten() for x in (begins, sizes, ranks))
    some = sizes.nonzero().squeeze(1)
    by_rank = some[ranks[some].argsort(stable=True)]
    bounds = bounds_of(sizes[by_rank]).long()
    counts = torch.zeros(layout.size, dtype=torch.int64).index_add_(0, ranks[some], sizes[some])
    return runs(begins[by_rank], bounds, int(bounds[-1])), tuple(counts.tolist()), length
