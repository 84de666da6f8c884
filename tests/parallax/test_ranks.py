"""Parallax over context-parallel ranks: as on one, and what is sent as it was counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.context_parallel import exchange as exchange_module
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.parts import Mask
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.parallax.attention import parallax_attention
from megatron_lighthouse.parallax.blocks import Moments, Plain
from megatron_lighthouse.parallax.centre import centred
from megatron_lighthouse.parallax.config import ParallaxConfig
from megatron_lighthouse.parallax.variant import PARALLAX
from megatron_lighthouse.sequence.layout import Layout
from tests.context_parallel.shards import shards_of, together
from tests.parallax.oracle import formula, inputs, with_grads
from tests.ranks import run_ranks
from tests.tolerances import assert_close


def over_ranks(group: dist.ProcessGroup | None, tensors: list[Tensor], how: dict[str, Any]) -> list[Tensor]:
    return with_grads(parallax_attention, shards_of(group, tensors), cp_group=group, **how)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
def test_ranks_equal_one(comm_type: str, size: int) -> None:
    """With grouped heads, keys that share a mean, large r, and a window that some chunks lie outside of."""
    groups = size if comm_type == "a2a" else 2
    for window in (None, 10):
        tensors = inputs(6 * size, 2, 2 * groups, groups, 5, r=2.0, mean=4.0)
        found = together(size, over_ranks, tensors, {"cp_comm_type": comm_type, "window": window, "softmax_scale": 0.8})
        for one, expected in zip(found, with_grads(formula, tensors, scale=0.8, window=window), strict=True):
            assert_close(one, expected, "ranks float64")


def centre_of(group: dist.ProcessGroup, key: Tensor) -> Tensor:
    return centred(shards_of(group, [key])[0], Exchange.over(group))


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_take_one_mean(size: int) -> None:
    """That of all tokens, to the bit."""
    key = torch.randn(48, 2, 2, 4, generator=torch.Generator().manual_seed(1)) + torch.tensor([9.0, -3.0, 0.3, 0.0])
    found = together(size, _as_list, key)[0]
    assert torch.equal(found, centred(key))
    assert found[..., :2].mean().abs() < 1e-5
    assert torch.equal(found[..., 3], key[..., 3])


def _as_list(group: dist.ProcessGroup, key: Tensor) -> list[Tensor]:
    return [centre_of(group, key)]


def test_parts_merge_whatever_the_mean_of_u() -> None:
    """A covariance merged from parts does not lose digits as t̄ grows, which differences of raw moments do."""
    query, r, key, value, _ = inputs(24, 1, 2, 2, 4, r=1e4, mean=1e3)
    block, mask = Plain(0.5), Mask((1,), (0,))
    whole = block.forward((query, r), (key, value), mask)
    part = block.forward((query, r), (key[:5], value[:5]), mask)
    part.merge(block.forward((query, r), (key[5:], value[5:]), mask))
    found, expected = (block.output(x) - x.averages[0] for x in (part, whole))
    assert (found - expected).norm() / expected.norm() < 1e-10


def test_a_merged_output_is_rounded_once() -> None:
    """fp16 parts, as two ranks merge them: what float64 makes of the same parts, rounded, but for ties."""
    generator = torch.Generator().manual_seed(3)

    def part() -> list[Tensor]:
        averages = [torch.randn(40, 2, 3, n, generator=generator) for n in (16, 16, 1)]
        return [averages[0].half(), averages[1].half(), 3 * averages[2], torch.randn(2, 3, 40, generator=generator)]

    (*own, lse), (*others, other_lse) = part(), part()
    exact = Moments(tuple(x.double() for x in own), lse.double())
    exact.merge(Moments(tuple(x.double() for x in others), other_lse.double()))
    merged = Moments(tuple(own), lse)
    merged.merge(Moments(tuple(others), other_lse))
    for found, expected in zip(merged.averages[:2], exact.averages[:2], strict=True):
        assert (found != expected.half()).double().mean() < 0.005


TOKENS, BATCH, HEADS, GROUPS, DIM = 64, 2, 8, 4, 8


def sent_by(group: dist.ProcessGroup, comm_type: str) -> list[dict[str, int]]:
    """What this rank sends forward, and backward."""
    tensors = [x.float() for x in inputs(TOKENS, BATCH, HEADS, GROUPS, DIM)]
    *leaves, grad = (x.requires_grad_() for x in shards_of(group, tensors))
    exchange_module.sent.clear()
    out = parallax_attention(*leaves, cp_group=group, cp_comm_type=comm_type)
    forward = dict(exchange_module.sent)
    exchange_module.sent.clear()
    out.backward(grad)
    return [forward, dict(exchange_module.sent)]


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
def test_ranks_send_what_was_counted(comm_type: str) -> None:
    for rank, ways in enumerate(run_ranks(4, sent_by, comm_type)):
        plan = PARALLAX.sent(ParallaxConfig(), TOKENS, Shape(BATCH, HEADS, GROUPS, DIM, 4), Layout(4, rank), comm_type)
        for way, sent in enumerate(ways):
            assert sent == {name: both[way] for name, both in plan.items() if both[way]}
