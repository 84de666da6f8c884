"""Time of one layer's attention by part. Seconds. What is fitted comes from `Coefficients`; all else is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lighthouse.lighthouse.geometry import Geometry, Shape
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.sharded.sent import layer_bytes
from megatron_lighthouse.plan import work
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.device import Device
from megatron_lighthouse.plan.documents import DocumentGeometry
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.variant import Variant
from megatron_lighthouse.variants import DENSE

type Parts = dict[str, float]


@dataclass(frozen=True)
class Setup:
    """What the time of a layer's attention depends on, besides its rows."""

    layer: Shape
    device: Device
    speed: Coefficients
    ranks: int = 1
    """Context-parallel ranks that share the sequence."""
    scheme: str = "p2p"
    """By which the attention crosses these: `--cp-comm-type`."""
    span: int = 1
    """GPUs from the first to the last of the ranks, which says what links they have; 1 where no group straddles domains."""
    base: Variant = DENSE
    """What attends; it takes what its `Work` says beside softmax."""
    around: Any = None
    """The config of `base`; None for its defaults."""
    past_alone: bool = False
    """Whether it attends to rows of a causal selection."""


def attention_seconds(kind: str, rows: int, setup: Setup, attended: float | None = None) -> tuple[float, float]:
    """(forward, forward + backward) of causal attention over `rows` rows, of which each rank does an equal part of the work.

    Args:
        kind: "dense", or "inner" for that over gathered rows.
        attended: rows of one document in which it does as much, where there are several.
    """
    layer, ranks, device, speed = setup.layer, setup.ranks, setup.device, setup.speed
    other = setup.base.work(setup.around, layer)
    flops = work.attention_flops(attended or rows, layer) / ranks
    channel = rows / ranks * layer.batch * layer.heads * layer.dim / device.memory_bytes_s
    start, slope = speed.attention[kind, "fwd"]
    both_start, both_slope = speed.attention[kind, "fwd+bwd"]
    both = both_start + both_slope * flops * work.FORWARD_AND_BACKWARD / device.flops
    forward = start + slope * flops / device.flops
    return other.forward * forward + other.moved * channel, other.both * both + other.moved_both * channel


def crossing_seconds(
    rows: int, setup: Setup, hide: tuple[float, float], sends: Callable[..., dict[str, tuple[int, int]]]
) -> tuple[float, float]:
    """(forward, forward + backward) that attention over several ranks takes beyond its share of the work.

    Args:
        hide: seconds of attention, forward and forward + backward, behind which p2p's bytes travel.
        sends: `sent` of what attends; of gathered rows its `rows_sent`.
    """
    ranks, scheme, device, speed = setup.ranks, setup.scheme, setup.device, setup.speed
    if ranks == 1:
        return 0.0, 0.0
    layouts = [Layout(ranks, rank) for rank in range(ranks)]
    sent = [sends(setup.around, rows, setup.layer, layout, scheme)["attend"] for layout in layouts]
    found = []
    for direction, bytes_sent, behind in (
        ("fwd", max(f for f, _ in sent), hide[0]),
        ("fwd+bwd", max(f + b for f, b in sent), hide[1]),
    ):
        each, start, slope = speed.ranks[scheme, direction]
        travel = bytes_sent / device.link_bytes_s(setup.span) * speed.link
        exposed = max(0.0, travel - behind * (ranks - 1) / ranks) if scheme == "p2p" else slope * travel
        found.append(start + each * (ranks - 1) + exposed)
    return found[0], found[1]


def dense_layer(rows: int, setup: Setup, attended: float | None = None) -> Parts:
    """Dense attention, or another over all tokens, without projections.

    'fwd', 'fwd+bwd', and 'exposed fwd' and 'exposed', which lie within them.

    Args:
        attended: see `attention_seconds`.
    """
    forward, both = attention_seconds("dense", rows, setup, attended)
    more, more_both = crossing_seconds(rows, setup, (forward, both), setup.base.sent)
    return {"fwd": forward + more, "fwd+bwd": both + more_both, "exposed fwd": more, "exposed": more_both}


def lighthouse_layer(geometry: Geometry, setup: Setup, scorer: str = "norm") -> Parts:
    """As `dense_layer`, and each step by name: 'score', 'select', 'gather', 'gather bwd', 'scatter', 'scatter bwd', 'inner'."""
    rows = geometry.gathered_length
    packed = geometry if isinstance(geometry, DocumentGeometry) else None
    parts = _steps(geometry, setup, scorer)
    if packed and packed.is_whole:
        parts = dict.fromkeys(parts, 0.0)
    inner, inner_both = attention_seconds("inner", rows, setup, packed.attended if packed else None)
    more, more_both = crossing_seconds(rows, setup, (inner, inner_both), setup.base.rows_sent)
    aside, aside_both = _aside_seconds(geometry, setup, scorer)
    more, more_both = more + aside, more_both + aside_both
    forward = sum(parts[name] for name in ("score", "select", "gather", "scatter"))
    backward = parts["gather bwd"] + parts["scatter bwd"]
    parts |= {"inner": inner_both, "inner fwd": inner, "exposed fwd": more, "exposed": more_both}
    return {**parts, "fwd": forward + inner + more, "fwd+bwd": forward + backward + inner_both + more_both}


def _steps(geometry: Geometry, setup: Setup, scorer: str) -> Parts:
    """The steps around the inner attention."""
    layer, ranks, device, speed = setup.layer, setup.ranks, setup.device, setup.speed
    rows, packed = geometry.gathered_length, geometry if isinstance(geometry, DocumentGeometry) else None
    parts: Parts = {}
    for step, direction in work.STEPS:
        start, slope = speed.steps[step, direction]
        moved = work.step_bytes(step, geometry.seq_length // ranks, rows // ranks, layer)
        if step == "gather":
            moved *= setup.base.row_bytes(setup.around, layer) / DENSE.row_bytes(None, layer)
        if step == "score":
            moved = SCORERS[scorer].moved(geometry, layer) / ranks
        parts[step + (" bwd" if direction == "bwd" else "")] = start + slope * moved / device.memory_bytes_s
    flops = packed.scorer_flops(scorer, layer) if packed else SCORERS[scorer].flops(geometry, layer)
    parts["score"] += flops / ranks / device.flops * speed.scorer
    alone = ranks if geometry.tiles % (2 * ranks) == 0 else 1  # where tiles span chunks, every rank decides about all
    features = work.select_features(geometry, layer, alone, device.multiprocessors)
    parts["select"] = sum(a * b for a, b in zip(speed.select, features, strict=True))
    return parts


def _aside_seconds(geometry: Geometry, setup: Setup, scorer: str) -> tuple[float, float]:
    """(forward, forward + backward) of all that ranks send beside the inner attention."""
    ranks = setup.ranks
    if ranks == 1:
        return 0.0, 0.0
    layouts = [Layout(ranks, rank) for rank in range(ranks)]
    what = (scorer, setup.base, setup.around, setup.past_alone)
    plans = [layer_bytes(setup.scheme, geometry, setup.layer, layout, *what) for layout in layouts]
    aside = [[sent for purpose, sent in plan.items() if purpose != "attend"] for plan in plans]
    link = setup.speed.link / setup.device.link_bytes_s(setup.span)
    return max(sum(f for f, _ in plan) for plan in aside) * link, max(sum(f + b for f, b in plan) for plan in aside) * link
