"""What a layer sends: bytes of one context-parallel rank, forward and backward, before anything is sent.

Counts what leaves a rank, in the dtype in which it leaves. `exchange.sent` counts the same while it happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.lighthouse.geometry import Geometry, Shape
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.sequence.layout import Layout

if TYPE_CHECKING:  # which asks this file
    from megatron_lighthouse.variant import Variant


def attend_bytes(comm_type: str, rows: int, shape: Shape, layout: Layout) -> tuple[int, int]:
    """(forward, backward) bytes that a rank sends in the attention over `rows` rows of all ranks.

    Args:
        comm_type: 'p2p', 'all_gather' or 'a2a', as this project does them.
    """
    others, chunk = layout.size - 1, rows // (2 * layout.size)
    both, element = shape.groups * (shape.dim + shape.values), shape.batch * shape.itemsize
    if comm_type == "p2p":
        # to a higher rank goes the early chunk of keys and values, to a lower one both; gradients go back for what came
        keys = (layout.size - 1 - layout.rank + 2 * layout.rank) * chunk * both * element
        gradients = (layout.rank + 2 * (layout.size - 1 - layout.rank)) * chunk * both * element
        return keys, keys + gradients
    if comm_type == "all_gather":
        keys = others * 2 * chunk * both * element
        return keys, 2 * keys
    once = 2 * chunk * (shape.heads * (shape.dim + shape.values) + both) * element * others // layout.size
    return once, once


def layer_bytes(
    comm_type: str,
    geometry: Geometry,
    shape: Shape,
    layout: Layout,
    scorer: str = "norm",
    base: Variant | None = None,
    around: Any = None,
    past_alone: bool = False,
) -> dict[str, tuple[int, int]]:
    """(forward, backward) bytes that a rank sends in one Lighthouse layer, by purpose; `base` attends to the rows, or softmax.

    `around` is the config of that, None for its defaults; `past_alone`: the selection is causal (`Place`).
    'deal', of rows that are dealt because tiles span chunks, is the most it can be: how many are dealt depends on the data.
    """
    size = layout.size
    halo = ((layout.rank < size - 1) + (layout.rank > 0)) * (geometry.levels - 1) * shape.batch * shape.heads * shape.values
    base = base or _softmax()
    plan = {
        **base.rows_sent(around, geometry.gathered_length, shape, layout, comm_type, past_alone),
        "halo": (halo * shape.itemsize, halo * shape.itemsize),
    }
    if forward := SCORERS[scorer].sent(geometry, shape, size):
        plan["scorer"] = (forward, 0)
    if geometry.tiles % (2 * size):
        selections = shape.batch * shape.groups // shape.heads_per_selection
        scores = 2 * selections * (geometry.coarse_length // size) * max(4, shape.itemsize)
        plan["select"] = (scores * (size - 1), 0)
        rows, given = geometry.gathered_length, base.row_bytes(around, shape)
        output = shape.batch * shape.itemsize * shape.heads * shape.values
        plan["deal"] = (rows * given + rows // size * output, rows // size * given + rows * output)
    return plan


def _softmax() -> Variant:
    from megatron_lighthouse.variants import DENSE  # which asks this file

    return DENSE


def summary(
    geometry: Geometry,
    shape: Shape,
    size: int,
    comm_type: str,
    scorer: str = "norm",
    base: Variant | None = None,
    around: Any = None,
    past_alone: bool = False,
) -> str:
    """One line for the start of a run: what the busiest rank sends in a layer and step, by each scheme."""

    def megabytes(scheme: str) -> str:
        what = (scorer, base, around, past_alone)
        ranks = [layer_bytes(scheme, geometry, shape, Layout(size, rank), *what) for rank in range(size)]
        return f"{max(sum(f + b for f, b in plan.values()) for plan in ranks) / 1e6:,.1f}"

    others = [name for name in COMM_TYPES if name != comm_type]
    spans, chunks = geometry.tiles % (2 * size) != 0, 2 * size
    tiles = "1 tile spans" if geometry.tiles == 1 else f"{geometry.tiles} tiles span"
    ways = f"{megabytes(comm_type)} MB in a layer and step by {comm_type}"
    ways += f" ({', '.join(f'{megabytes(name)} by {name}' for name in others)})"
    if spans:
        how = f"at most {ways}; {tiles} the {chunks} chunks, so ranks exchange scores and deal rows."
    else:
        how = f"{ways}; each of {geometry.tiles} tiles lies in one of {chunks} chunks, so ranks select alone."
    return f"lighthouse: context parallel {size}: a rank sends {how}"
