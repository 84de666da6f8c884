"""What a layer over packed documents sends: bytes of one rank, as `lighthouse.sharded.sent` has them for one sequence."""

from __future__ import annotations

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

    'deal', of rows on their way to attention and back, is the most it can be: how many are dealt depends on the data.
    """
    if packing.is_whole:
        return {"attend": attend_bytes(comm_type, packing.seq_length, shape, layout)}
    shares, size, row = Shares.of(packing, layout), layout.size, shape.dim * shape.itemsize
    together, (here, there) = (shape.heads + 2 * shape.groups) * row, shares.align
    aligned = (len(end.rows) - end.counts[layout.rank] for end in (here, there))
    windows = shares.most_windows * (size - 1)
    entries = Pyramid(packing.rule.window, packing.levels, packing.pooling).coarse_length
    rows, copies = packing.gathered_length, len(shares.wanted)
    dealt, attended = rows * together, len(shares.own_rows)
    plan = {
        "align": (next(aligned) * together, next(aligned) * together),
        "deal": (
            dealt + attended * copies * shape.heads * row,
            attended * together + rows * copies * shape.heads * row,
        ),
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
