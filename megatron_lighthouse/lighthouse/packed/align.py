"""Which tokens travel to the rank that owns their window, in a row of documents: found by runs of them. Integers alone.

Of a rank's chunk of a document the tokens of windows that end in it stay, and so do those in no window. Those after the last
such window go to the rank in whose chunk the next one ends. What a rank has of a window before its own chunk comes from the
ranks of the chunks before that. Both ends list tokens by the rank at the other end, then in the order of the row. Runs are
found on the CPU, their tokens where the row is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.transfer import End
from megatron_lighthouse.lighthouse.packed.packing import bounds_of
from megatron_lighthouse.lighthouse.packed.pieces import Cut
from megatron_lighthouse.sequence.documents import runs
from megatron_lighthouse.sequence.layout import Layout


def leaving(cut: Cut, sizes: Tensor, layout: Layout, device: torch.device) -> End:
    """This rank's tokens, as it holds them.

    Args:
        sizes: [2C, n], tokens of each chunk of each document.
    """
    _, _, owned, loose, end, _ = cut.edges
    owned = torch.maximum(owned, cut.begin)  # what is before the chunk is held elsewhere
    edges = torch.stack([cut.begin, owned, loose, end])
    last = (owned // cut.pieces.rule.window + 1) * cut.pieces.rule.window - 1
    # after the last window, and in whole documents, there is no token that could go anywhere
    chunk = (sizes.cumsum(0)[:, cut.document] <= last).sum(0).clamp(max=len(sizes) - 1)
    here = torch.full_like(chunk, layout.rank)
    ranks = torch.stack([here, torch.minimum(chunk, len(sizes) - 1 - chunk), here])
    held = bounds_of(end - cut.begin).long()
    begins = edges[:-1] + (held[:-1] - cut.begin)
    return _end(begins, edges.diff(dim=0), ranks, cut.document, layout, cut.tokens, device)


def arriving(cut: Cut, sizes: Tensor, layout: Layout, device: torch.device) -> End:
    """The tokens of this rank's pieces; `sizes` as for `leaving`."""
    start, first, owned, loose, end, _ = cut.edges
    kept = torch.minimum(torch.maximum(first, cut.begin), owned)  # of its own windows, from here on in its own chunk
    chunk = torch.arange(len(sizes)).unsqueeze(1)
    edges = sizes.cumsum(0)[:, cut.document]
    ends = torch.cat([torch.maximum(torch.minimum(edges, kept), first), owned.unsqueeze(0)])
    begins = torch.cat([first.unsqueeze(0), ends[:-1]])
    ranks = torch.minimum(chunk, len(sizes) - 1 - chunk).expand(-1, len(start))
    here = torch.full_like(start, layout.rank).unsqueeze(0)
    begins, ends = torch.cat([begins, loose.unsqueeze(0)]), torch.cat([ends, end.unsqueeze(0)])
    shift, ranks = cut.bounds[:-1] - start, torch.cat([ranks, here, here])
    return _end(begins + shift, ends - begins, ranks, cut.document, layout, cut.pieces.seq_length, device)


def _end(
    begins: Tensor, sizes: Tensor, ranks: Tensor, document: Tensor, layout: Layout, length: int, device: torch.device
) -> End:
    """Of [runs, pieces] each, in the order of the row in every piece."""
    in_order = document.argsort(stable=True)
    begins, sizes, ranks = (x[:, in_order].t().flatten() for x in (begins, sizes, ranks))
    some = sizes.nonzero().squeeze(1)
    by_rank = some[ranks[some].argsort(stable=True)]
    bounds = bounds_of(sizes[by_rank]).long()
    counts = torch.zeros(layout.size, dtype=torch.int64).index_add_(0, ranks[some], sizes[some])
    table = torch.stack([begins[by_rank], bounds[:-1], bounds[1:]]).to(device, non_blocking=True)
    rows = runs(table[0], torch.cat([table[1, :1], table[2]]), int(bounds[-1]))
    return End(rows, tuple(counts.tolist()), length)
