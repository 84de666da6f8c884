"""Lighthouse around Parallax: by hand from Lighthouse's own steps, over ranks as on one, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.context_parallel import exchange
from megatron_lighthouse.lighthouse.around import AROUND
from megatron_lighthouse.lighthouse.attention import attended_rows
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.reference import gather, scatter
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.variant import LIGHTHOUSE
from megatron_lighthouse.parallax.config import ParallaxConfig
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.variant import Place
from megatron_lighthouse.wall.config import WallConfig
from tests.context_parallel.shards import shards_of, together
from tests.parallax.oracle import formula, inputs, with_grads
from tests.ranks import run_ranks
from tests.tolerances import assert_close

ALONE = LighthouseConfig(levels=3, pooling=2, budget=32, tile_budget=4, around="parallax")
DEAL = ALONE.replace(tile_budget=32)
ROTARY = Rotary(torch.tensor([0.3, 0.02]))
TOKENS, BATCH, HEADS, GROUPS, DIM = 256, 2, 8, 4, 8
"""On four ranks ALONE has each select in its own tiles, and DEAL deals rows."""


def around(query: Tensor, r: Tensor, key: Tensor, value: Tensor, config: LighthouseConfig = ALONE, **how: Any) -> Tensor:
    return lighthouse_attention(query, key, value, config, streams=[r], **how)


@pytest.mark.parametrize("rotary", [None, ROTARY], ids=["mean", "last"])
def test_r_goes_the_way_of_the_queries(rotary: Rotary | None) -> None:
    """Output and gradients: pooled, gathered and attended one by one, by the paper's formula, over the same selection."""
    tensors = inputs(TOKENS, BATCH, HEADS, GROUPS, DIM, r=1.0, mean=3.0)
    plain = ALONE.replace(around="softmax")
    selection = attended_rows(tensors[0], tensors[2], tensors[3], plain, Place(rotary=rotary)).selection

    def by_hand(query: Tensor, r: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows_q, rows_k, rows_v = gather(query, key, value, selection, rotary=rotary)
        rows_r, _, _ = gather(r, key, value, selection, rotary=rotary)
        return scatter(formula(rows_q, rows_r, rows_k, rows_v), selection)

    for one, expected in zip(with_grads(around, tensors, rotary=rotary), with_grads(by_hand, tensors), strict=True):
        assert_close(one, expected, "ranks float64")


def test_heads_that_share_a_selection() -> None:
    """Rows of q and r come back to the heads they left."""
    config = ALONE.replace(heads_per_selection=2)
    query, r, key, value, _ = inputs(TOKENS, BATCH, HEADS, GROUPS, DIM, r=1.0)
    selection = attended_rows(query, key, value, config.replace(around="softmax")).selection
    rows_q, rows_k, rows_v = gather(query, key, value, selection)
    rows_r, _, _ = gather(r, key, value, selection)
    assert_close(
        around(query, r, key, value, config), scatter(formula(rows_q, rows_r, rows_k, rows_v), selection), "ranks float64"
    )


def test_without_r_it_is_lighthouse() -> None:
    query, r, key, value, _ = inputs(TOKENS, BATCH, HEADS, GROUPS, DIM, r=0.0)
    assert_close(
        around(query, r, key, value), lighthouse_attention(query, key, value, ALONE.replace(around="softmax")), "float64"
    )


def test_gradients_by_finite_differences() -> None:
    config = LighthouseConfig(levels=2, pooling=2, budget=4, tile_budget=2, around="parallax")
    leaves = [x.requires_grad_() for x in inputs(16, 1, 2, 1, 3, mean=1.0)[:4]]
    selection = attended_rows(leaves[0], leaves[2], leaves[3], config, streams=[leaves[1]]).selection
    assert torch.autograd.gradcheck(lambda *x: around(*x, config=config, selection=selection), leaves)


def test_packed_documents_are_as_alone() -> None:
    """Long enough to select, and whole; with means of their keys far apart. None sees another's."""
    lengths, config = (96, 7, 153), LighthouseConfig(levels=3, pooling=2, budget=4, tile_budget=2, around="parallax")
    tensors = inputs(sum(lengths), 1, HEADS, GROUPS, DIM, r=1.0)
    tensors[2][96:] += 10.0
    bounds = torch.tensor([0, 96, 103, 256], dtype=torch.int32)
    found = with_grads(around, tensors, config=config, cu_seqlens=bounds, rotary=ROTARY)
    for begin, end in pairwise(bounds.tolist()):
        alone = torch.tensor([0, end - begin], dtype=torch.int32)
        part = [x[begin:end] for x in tensors]
        expected = with_grads(around, part, config=config, cu_seqlens=alone, rotary=ROTARY)
        plain = with_grads(formula, part)
        for i, (whole, one) in enumerate(zip(found, expected, strict=True)):
            assert_close(whole[begin:end], one, "ranks float64")
            if end - begin == 7:  # goes in whole: Parallax itself
                assert_close(one, plain[i], "ranks float64")


def over_ranks(group: dist.ProcessGroup | None, tensors: list[Tensor], how: dict[str, Any]) -> list[Tensor]:
    return with_grads(around, shards_of(group, tensors), cp_group=group, **how)


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
@pytest.mark.parametrize("config", [ALONE, DEAL], ids=["ranks select alone", "one tile"])
def test_ranks_equal_one(config: LighthouseConfig, comm_type: str) -> None:
    tensors = inputs(TOKENS, BATCH, HEADS, GROUPS, DIM, r=2.0, mean=4.0)
    how = {"config": config, "softmax_scale": 0.8, "rotary": ROTARY}
    expected = with_grads(around, tensors, **how)
    for size in (2, 4):
        for one, other in zip(together(size, over_ranks, tensors, {**how, "cp_comm_type": comm_type}), expected, strict=True):
            assert_close(one, other, "ranks float64")


def sent_by(group: dist.ProcessGroup, config: LighthouseConfig, comm_type: str) -> list[dict[str, int]]:
    """What this rank sends forward, and backward."""
    tensors = [x.float() for x in inputs(TOKENS, BATCH, HEADS, GROUPS, DIM)]
    *leaves, grad = (x.requires_grad_() for x in shards_of(group, tensors))
    exchange.sent.clear()
    out = around(*leaves, config=config, cp_group=group, cp_comm_type=comm_type)
    forward = dict(exchange.sent)
    exchange.sent.clear()
    out.backward(grad)
    return [forward, dict(exchange.sent)]


@pytest.mark.parametrize("comm_type", ["p2p", "a2a"])
@pytest.mark.parametrize(
    "config",
    [ALONE, DEAL, ALONE.replace(causal_selection=True)],
    ids=["ranks select alone", "one tile", "causal, whose keys are not centred"],
)
def test_ranks_send_what_was_counted(config: LighthouseConfig, comm_type: str) -> None:
    for rank, ways in enumerate(run_ranks(4, sent_by, config, comm_type)):
        plan = LIGHTHOUSE.sent(config, TOKENS, Shape(BATCH, HEADS, GROUPS, DIM, 4), Layout(4, rank), comm_type)
        for way, sent in enumerate(ways):
            planned = {name: both[way] for name, both in plan.items() if both[way]}
            assert sent.pop("deal", 0) <= planned.pop("deal", 0)
            assert sent == planned


@pytest.mark.parametrize(
    ("config", "shapes", "how", "says"),
    [
        (ALONE, [], {}, r"config.around parallax reads 1 \(r\) besides query, key and value, got 0"),
        (ALONE, [HEADS, HEADS], {}, r"reads 1 \(r\) besides query, key and value, got 2"),
        (ALONE.replace(around="softmax"), [HEADS], {}, "config.around softmax reads none besides query, key and value, got 1"),
        (ALONE, [GROUPS], {}, "r of config.around parallax must be like the query"),
        (ALONE, [HEADS], {"sinks": torch.zeros(HEADS)}, r"sinks are not done by config.around parallax"),
        (ALONE, [HEADS], {"around": ParallaxConfig(), "attend": print}, "around belongs to the default inner attention"),
    ],
)
def test_what_cannot_be_is_refused(config: LighthouseConfig, shapes: list[int], how: dict[str, Any], says: str) -> None:
    query, key = (torch.zeros(TOKENS, 1, n, DIM) for n in (HEADS, GROUPS))
    with pytest.raises(ValueError, match=says):
        lighthouse_attention(query, key, key, config, streams=[torch.zeros(TOKENS, 1, n, DIM) for n in shapes], **how)


@pytest.mark.parametrize(
    ("around", "streams", "options", "says"),
    [
        ("wall", [None], None, "streams must be torch.Tensors, not a NoneType"),
        (
            "wall",
            [torch.zeros(64, 1, 2, 4)],
            ParallaxConfig(),
            "around of config.around wall must be a WallConfig, not",
        ),
        ("softmax", [], WallConfig(), "around of config.around softmax must be None, for it has no options, not a WallConfig"),
    ],
)
def test_options_of_another_attention_are_refused(around: str, streams: list[Any], options: Any, says: str) -> None:
    query = torch.zeros(64, 1, 2, 4)
    config = ALONE.replace(budget=8, around=around)
    with pytest.raises(TypeError, match=says):
        lighthouse_attention(query, query, query, config, streams=streams, around=options)


def test_backends_of_softmax_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"config\.inner fa3 is of softmax attention, and config\.around parallax has kernels of"
    ):
        ALONE.replace(inner="fa3")
    with pytest.raises(ValueError, match=r"config\.around 'wide' is not known: use 'softmax' or 'parallax' or 'wall'"):
        ALONE.replace(around="wide")


def test_the_name_is_that_of_the_attention() -> None:
    """By which scripts name stage 2; softmax's is Megatron's own."""
    assert all(name == variant.name or variant.native for name, variant in AROUND.items())
