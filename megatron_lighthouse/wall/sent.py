"""What a layer of Wall sends, counted before it does. See `exchange.sent`, which counts while it happens."""

from __future__ import annotations

from dataclasses import replace

from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.sharded.sent import attend_bytes
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.wall.cut import TOTALS, Cut, Step


def sent(
    comm_type: str,
    tokens: int,
    shape: Shape,
    layout: Layout,
    tied: bool,
    scalar: bool,
    wide: int = 4,
    gathered: bool = False,
    paired: bool = False,
) -> dict[str, tuple[int, int]]:
    """(forward, backward) bytes that a rank sends, by purpose, for inputs of this shape (V = K).

    Args:
        tied: whether the query heads of a key/value head share gates.
        scalar: whether there are scalar gates.
        wide: bytes of an element in the dtype of sums.
        gathered: whether they are Lighthouse's rows: then keys have the heads of gates, and gates the dtype of sums.
        paired: whether the logits of gates are of pairs of channels.
    """
    gates = shape.groups if tied else shape.heads
    if comm_type == "a2a":
        logits = gates * (shape.dim // 2 if paired else shape.dim) + (shape.heads if scalar else 0)
        columns = logits * (wide if gathered else shape.itemsize)
        if gathered:
            columns += (gates - shape.groups) * shape.dim * shape.itemsize
        rows = tokens // layout.size * shape.batch * columns * (layout.size - 1) // layout.size
        forward, backward = attend_bytes(comm_type, tokens, shape, layout)
        return {"attend": (forward + rows, backward + rows)}
    # of as many heads of decayed keys as of gates, and as many of values as ever: counted as pairs, twice
    kinds = [replace(shape, groups=gates + shape.groups)]
    if scalar:
        kinds.append(Shape(shape.batch, shape.heads, shape.heads, 1, wide))
    ways = zip(*(attend_bytes(comm_type, tokens, kind, layout) for kind in kinds), strict=True)
    forward, backward = (sum(bytes_of) // 2 for bytes_of in ways)
    pieces = 2 * Cut(tokens // (2 * layout.size), Step.TOKENS).per_chunk
    of_pieces = gates * shape.dim + (shape.heads if scalar else 0)
    totals = (layout.size - 1) * pieces * shape.batch * of_pieces * wide
    return {"attend": (forward, backward), TOTALS: (totals, totals)}
