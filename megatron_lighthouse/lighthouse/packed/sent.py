"""What a layer over packed documents sends: bytes of one rank, as `lighthouse.sharded.sent` has them for one sequence."""

from __future__ import annotations

import math

import torch

from megatron_lighthouse.lighthouse.geometry import Pyramid, Shape
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.shares import Shares
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.sharded.sent import attend_bytes
from megatron_lighthouse.sequence.layout import Layout


def document_bytes(
    comm_type: str, packing: Packing, shape: Shape, layout: Layout, scorer: str = "norm"
) -> dict[str, tuple[int, int]]:
    """(forward, backward) bytes that a rank sends in one layer, by purpose.

    'deal', of rows on their way to attention and back, is what is expected: how many are dealt depends on the data.
    """
    if packing.is_whole:
        return {"attend": attend_bytes(comm_type, packing.seq_length, shape, layout)}
    shares, size = Shares.of(packing, layout), layout.size
    together = ((shape.heads + shape.groups) * shape.dim + shape.groups * shape.values) * shape.itemsize
    output, way = shape.heads * shape.values * shape.itemsize, shares.align
    aligned = (len(end.rows) - end.counts[layout.rank] for end in (way.here, way.there))
    windows = shares.most_windows * (size - 1)
    entries = Pyramid(packing.rule.window, packing.levels, packing.pooling).coarse_length
    gathered, attended = dealt(packing, layout)
    plan = {
        "align": (next(aligned) * together, next(aligned) * together),
        "deal": (round(gathered * together + attended * output), round(attended * together + gathered * output)),
        "attend": attend_bytes(comm_type, shares.rows.tokens, shape, layout),
    }
    known = SCORERS[scorer]
    if not known.shares:
        return plan | {"scorer": (windows * packing.rule.window * together, 0)}
    plan["select"] = (windows * 2 * shape.groups * entries * max(4, shape.itemsize), 0)
    pyramid = Pyramid(shares.most_windows * packing.rule.window * size, packing.levels, packing.pooling)
    if forward := known.sent(pyramid, shape, size):
        plan["scorer"] = (forward, 0)
    return plan


def dealt(packing: Packing, layout: Layout) -> tuple[float, float]:
    """Rows of each head that a rank gathers for others to attend to, and that it attends to for others (ours).

    A tile has as many rows whatever the scores are. So only within the tile that a chunk of tokens ends in can more or fewer
    rows come before that end than before the end of the chunk of rows, where the next rank begins to attend to them. What is
    expected is for scores that do not go by the place: of the tile's m refined windows of W those before the end, at a share f
    of the tile, have variance m f(1-f)(1-m/W), and with p candidates for each of m at a finer level those have m f(1-f)(1-1/p)
    more. Rows that spill over the end of a chunk, one or two at each, are left out.
    """
    rule, shares = packing.rule, Shares.of(packing, layout)
    windows, _, tiles, rest, budget = packing.counts.double()
    ends = shares.sizes.cumsum(0)[:-1].double()
    ends_of_rows = packing.rows.chunk_sizes(layout.size).cpu().cumsum(0)[:-1]
    number = (ends // (rule.tile_windows * rule.window)).minimum((tiles - 1).clamp(min=0))
    is_last = number == tiles - 1
    tile, m = rest.where(is_last, rule.tile_windows).clamp(min=1), budget.where(is_last, rule.tile_budget)
    levels, pooling = rule.levels - 1, rule.pooling
    share = ((ends / rule.window - number * rule.tile_windows) / tile).clamp(0, 1)
    full = rule.tile_windows + levels * pooling * rule.tile_budget
    before = number * full + share * (tile + levels * pooling * m) * tiles.sign() + (ends - windows * rule.window).clamp(min=0)
    finer = (1 - 1 / pooling) * sum(i**2 for i in range(1, levels))
    spread = (pooling**2 * m * share * (1 - share) * (levels**2 * (1 - m / tile).clamp(min=0) + finer)).sqrt().clamp(min=1e-9)
    shift = before - ends_of_rows
    bell = (-0.5 * (shift / spread) ** 2).exp() * spread / math.sqrt(2 * math.pi)
    on, back = ((bell + x * torch.special.ndtr(x / spread)).sum(1).tolist() for x in (shift, -shift))
    gathered = attended = 0.0
    for chunk in range(len(on)):
        left, right = (layout.owner(c) == layout.rank for c in (chunk, chunk + 1))
        if left != right:
            gathered += on[chunk] if left else back[chunk]
            attended += back[chunk] if left else on[chunk]
    return gathered, attended
