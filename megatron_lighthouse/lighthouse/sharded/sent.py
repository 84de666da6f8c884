"""What a layer sends: bytes of one context-parallel rank, forward and backward, before anything is sent.

Counts what leaves a rank, in the dtype in which it leaves. `exchange.sent` counts the same while it happens.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.lighthouse.scorers.gla import SEGMENT
from megatron_lighthouse.lighthouse.scorers.streams import DELTA
from megatron_lighthouse.sequence.layout import Layout


@dataclass(frozen=True)
class Layer:
    """The shape of one layer's inputs on one rank."""

    batch: int
    heads: int
    """H, query heads of a tensor-parallel rank."""
    groups: int
    """G, key/value heads of a tensor-parallel rank."""
    dim: int
    itemsize: int
    """Bytes of an element of Q, K and V."""


def attend_bytes(comm_type: str, rows: int, layer: Layer, layout: Layout) -> tuple[int, int]:
    """(forward, backward) bytes that a rank sends in the attention over `rows` rows of all ranks.

    Args:
        comm_type: 'p2p', 'all_gather' or 'a2a', as this project does them.
    """
    others, chunk = layout.size - 1, rows // (2 * layout.size)
    row = layer.batch * layer.dim * layer.itemsize
    if comm_type == "p2p":
        # to a higher rank goes the early chunk of keys and values, to a lower one both; gradients go back for what came
        keys = (layout.size - 1 - layout.rank + 2 * layout.rank) * chunk * 2 * layer.groups * row
        gradients = (layout.rank + 2 * (layout.size - 1 - layout.rank)) * chunk * 2 * layer.groups * row
        return keys, keys + gradients
    if comm_type == "all_gather":
        keys = others * 2 * chunk * 2 * layer.groups * row
        return keys, 2 * keys
    once = 2 * chunk * (2 * layer.heads + 2 * layer.groups) * row * others // layout.size
    return once, once


def scorer_bytes(scorer: str, geometry: Geometry, layer: Layer, layout: Layout) -> int:
    """Bytes that a rank sends, forward, for the scorer of that name."""
    tokens, heads, wide = geometry.seq_length // layout.size, layer.batch * layer.groups, max(4, layer.itemsize)
    if scorer in ("dilated", "summary"):  # keys, values and mean queries; of the coarsest windows, or of all tokens
        rows = tokens if scorer == "dilated" else tokens // geometry.window(geometry.levels - 1)
        return (layout.size - 1) * 3 * rows * heads * layer.dim * layer.itemsize
    if scorer == "gla":  # the state and the gate of each segment of each stream, both ways
        positions = tokens // 2 // DELTA
        segments = 2 * -(-positions // min(SEGMENT, positions)) * DELTA
        return (layout.size - 1) * 2 * segments * heads * (layer.dim**2 + 1) * wide
    return 0


def layer_bytes(
    comm_type: str, geometry: Geometry, layer: Layer, layout: Layout, scorer: str = "norm"
) -> dict[str, tuple[int, int]]:
    """(forward, backward) bytes that a rank sends in one Lighthouse layer, by purpose.

    'deal', of rows that are dealt because tiles span chunks, is the most it can be: how many are dealt depends on the data.
    """
    size = layout.size
    halo = ((layout.rank < size - 1) + (layout.rank > 0)) * (geometry.levels - 1) * layer.batch * layer.heads * layer.dim
    plan = {
        "attend": attend_bytes(comm_type, geometry.gathered_length, layer, layout),
        "halo": (halo * layer.itemsize, halo * layer.itemsize),
    }
    if scorer != "norm":
        plan["scorer"] = (scorer_bytes(scorer, geometry, layer, layout), 0)
    if geometry.tiles % (2 * size):
        scores = 2 * layer.batch * layer.groups * (geometry.coarse_length // size) * max(4, layer.itemsize)
        plan["select"] = (scores * (size - 1), 0)
        rows = geometry.gathered_length * layer.batch * layer.dim * layer.itemsize
        dealt = rows * (layer.heads + 2 * layer.groups) + rows // size * layer.heads
        plan["deal"] = (dealt, rows // size * (layer.heads + 2 * layer.groups) + rows * layer.heads)
    return plan


def summary(geometry: Geometry, layer: Layer, size: int, comm_type: str, scorer: str = "norm") -> str:
    """One line for the start of a run: what the busiest rank sends in a layer and step, by each scheme."""

    def megabytes(scheme: str) -> str:
        ranks = [layer_bytes(scheme, geometry, layer, Layout(size, rank), scorer) for rank in range(size)]
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
