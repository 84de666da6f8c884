"""The steps over packed documents as Triton kernels: what `megatron_lighthouse.lighthouse.packed.reference` computes.

One launch a step for all documents of a row, whose boundaries are read from tables; else as the kernels for one sequence, of
which these are made: no atomics, no read by the host, every sum in one order.
"""

from __future__ import annotations

from torch import Tensor

from megatron_lighthouse.kernels import lighthouse as alone
from megatron_lighthouse.kernels.lighthouse.packed.attended import compute_packed_squares
from megatron_lighthouse.kernels.lighthouse.packed.gather import PackedGather
from megatron_lighthouse.kernels.lighthouse.packed.scatter import PackedScatter
from megatron_lighthouse.kernels.lighthouse.packed.score import compute_packed_scores
from megatron_lighthouse.kernels.lighthouse.packed.select import compute_packed_places
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.steps import Runs
from megatron_lighthouse.lighthouse.reference import group_norms
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.sequence.documents import Documents

__all__ = ["alone", "attended_norms", "gather", "scatter", "score", "select"]


def score(query: Tensor, key: Tensor, packing: Packing) -> Tensor:
    """See `PackedSteps.score`."""
    return compute_packed_scores(query.detach(), key.detach(), packing)


def attended_norms(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    runs: Runs | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `PackedSteps.attended_norms`."""
    squares = compute_packed_squares(query.detach(), key.detach(), value.detach(), documents, runs, scale)
    return group_norms(squares.unflatten(1, (key.shape[2], -1)))


def select(scores: Tensor, packing: Packing, pin_first: bool) -> Selection:
    """See `PackedSteps.select`."""
    return Selection(packing, compute_packed_places(scores, packing, pin_first), packing.gathered_length)


def gather(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, rotary: Rotary | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `PackedSteps.gather`."""
    rows: tuple[Tensor, Tensor, Tensor] = PackedGather.apply(query, key, value, selection, rotary)
    return rows


def scatter(rows: Tensor, selection: Selection) -> Tensor:
    """See `PackedSteps.scatter`."""
    return PackedScatter.apply(rows, selection)
