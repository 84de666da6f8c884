"""The steps as Triton kernels: what `megatron_lighthouse.lighthouse.reference` computes, at the speed of memory.

One file a step. No atomics, no global sort, no host synchronisation; every element is written once and every sum has one
order, so results are bit-identical from run to run. Each step is a custom op of torch with a fake implementation and its
own backward, so that torch.compile passes through. See `megatron_lighthouse.lighthouse.steps` for the interface.
"""

from __future__ import annotations

from torch import Tensor

from megatron_lighthouse.kernels.launch import run
from megatron_lighthouse.kernels.lighthouse.attended import attended_op, compute_squares
from megatron_lighthouse.kernels.lighthouse.causal import compute_causal_places, select_causally_op
from megatron_lighthouse.kernels.lighthouse.gather import NOT_TURNED, Gather
from megatron_lighthouse.kernels.lighthouse.scatter import Scatter
from megatron_lighthouse.kernels.lighthouse.score import compute_scores, score_op
from megatron_lighthouse.kernels.lighthouse.select import compute_places, select_op
from megatron_lighthouse.lighthouse.geometry import Geometry, Pyramid
from megatron_lighthouse.lighthouse.reference import chunk_starts, group_norms
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.steps import FarTravel, HaloTravel
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.base import scale_of


def score(query: Tensor, key: Tensor, geometry: Pyramid) -> Tensor:
    """See `Steps.score`."""
    return run(score_op, compute_scores, query, key, geometry.pyramid)


def attended_norms(query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, scale: float | None = None) -> Tensor:
    """See `Steps.attended_norms`."""
    starts = chunk_starts(query.shape[0], layout)
    inputs = (query.detach(), key.detach(), value.detach())
    squares = run(attended_op, compute_squares, *inputs, starts, scale_of(query, scale))
    return group_norms(squares.unflatten(1, (key.shape[2], -1)))


def select(scores: Tensor, geometry: Geometry, pin_first: bool, causal: bool = False) -> Selection:
    """See `Steps.select`."""
    if causal:
        places, spills = run(select_causally_op, compute_causal_places, scores, geometry.sizes)
        return Selection(geometry, places, geometry.gathered_length, spills=spills)
    places = run(select_op, compute_places, scores, geometry.sizes, pin_first)
    return Selection(geometry, places, geometry.gathered_length)


def gather(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    travel: FarTravel | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Steps.gather`."""
    turns, pairing = None, NOT_TURNED
    if rotary is not None:
        pyramid = selection.geometry
        turns, pairing = rotary.turns(pyramid.window(pyramid.levels - 1), query.device), rotary.pairing
    return Gather.apply(query, key, value, selection.places, selection.sizes, turns, pairing, travel)


def scatter(rows: Tensor, selection: Selection, halo: Tensor | None = None, travel: HaloTravel | None = None) -> Tensor:
    """See `Steps.scatter`."""
    return Scatter.apply(rows, halo, selection.scattered, selection.sizes, travel, selection.spills is not None)
