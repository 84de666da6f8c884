"""A causal selection: `lighthouse.causal` in torch, whose two long sums over windows are kernels: ranks, and places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue
from megatron_lighthouse.kernels.lighthouse.select import place_launch
from megatron_lighthouse.lighthouse.causal import select_causally
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.ranges import profiled

BLOCK = 64
"""Scores that a program ranks, and that it compares them with at a time."""
WARPS = 4


@triton.jit(repr=lambda _: "lighthouse_earlier_as_high")
def earlier_kernel(p_scores, p_ranks, length, BLOCK: tl.constexpr):
    """Of scores [rows, length], how many before each in its row are at least as high; program (row, block of scores)."""
    offset = tl.program_id(0).to(tl.int64) * length
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(p_scores + offset + i, mask=i < length, other=0.0)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, (tl.program_id(1) + 1) * BLOCK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other = tl.load(p_scores + offset + j, mask=j < length, other=-1.0)
        as_high = (other[None, :] >= score[:, None]) & (j[None, :] < i[:, None])
        count += tl.sum(as_high.to(tl.int32), 1)
    tl.store(p_ranks + offset + i, count, mask=i < length)


def earlier_as_high(scores: Tensor) -> Tensor:
    """See `lighthouse.causal.earlier_as_high`; int32."""
    scores = scores.contiguous()
    ranks = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    length = scores.shape[-1]
    enqueue(
        earlier_kernel,
        (scores.numel() // length, cdiv(length, BLOCK), 1),
        (scores, ranks),
        (length,),
        {"BLOCK": BLOCK},
        num_warps=WARPS,
    )
    return ranks.long()  # for they are multiplied


def _places_of(gathered: list[Tensor], geometry: Geometry) -> Tensor:
    """The places of entries, from which are gathered, a mask a level: the children of refined entries."""
    refined = torch.cat([level[..., :: geometry.pooling] for level in gathered[:-1]], -1).int()
    lengths = geometry.level_lengths[1:]
    before = torch.cat([level.cumsum(-1) - level for level in refined.split(lengths, -1)], -1)
    batch, groups, _ = refined.shape
    places = refined.new_empty(batch, groups, geometry.pyramid_length)
    place_launch(geometry, batch * groups)((2 * before + refined).int(), places)
    return places


def compute_causal_places(scores: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`Selection.places` and `Selection.spills` from scores [2, B, G, coarse length]; `sizes` is (N, L, p, k, m)."""
    with profiled("select"):
        selection = select_causally(scores, Geometry(*sizes), _places_of, earlier_as_high)
        assert selection.spills is not None
        return selection.places, selection.spills


def _empty(scores: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = (*scores.shape[1:3], Geometry(*sizes).pyramid_length)
    places, spills = (torch.empty(shape, dtype=torch.int32, device=scores.device) for _ in range(2))
    return places, spills


select_causally_op = torch.library.custom_op("lighthouse::select_causally", compute_causal_places, mutates_args=())
select_causally_op.register_fake(_empty)
