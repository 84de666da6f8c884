"""Sinks: the inner attention against its formula in float64, on one rank and on several; windows over ranks with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.softmax import sinks as sinks_of
from megatron_lighthouse.softmax.backends import BACKENDS
from megatron_lighthouse.softmax.sharded import sharded_attention
from tests.context_parallel.shards import Group, inputs_of, shards_of, whole
from tests.oracle import Problem
from tests.ranks import run_ranks
from tests.tolerances import assert_close

PROBLEM = Problem(64, 3, 2, 8, 2, batch=2, groups=2, queries_per_group=2, dim=8, seed=3)
CONFIG = LighthouseConfig(**PROBLEM.options)
SCALE = 0.3


def formula(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, window: int | None = None) -> Tensor:
    """Causal attention in which the softmax has one more logit a head, without a value."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    logits = torch.einsum("nbhd,mbhd->bhnm", query, key) * SCALE
    past = torch.arange(len(query)).unsqueeze(1) - torch.arange(len(key))
    hidden = (past < 0) | (past > (len(query) if window is None else window))
    logits = logits.masked_fill(hidden, -torch.inf)
    sink = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.einsum("bhnm,mbhd->nbhd", torch.cat([logits, sink], -1).softmax(-1)[..., :-1], value)


def sinks_like(x: Tensor) -> Tensor:
    """One of a head that no row can tell from none, and some that matter."""
    sinks = torch.linspace(-1, 3, x.shape[2], dtype=x.dtype)
    sinks[0] = -40
    return sinks


def answers(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, grad: Tensor, sinks: Tensor
) -> list[Tensor]:
    """Output, and the gradients of q, k, v and sinks."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value, sinks)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def lighthouse(group: Group, comm_type: str, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
    how: dict[str, Any] = {"cp_group": group, "cp_comm_type": comm_type, "softmax_scale": SCALE}
    return lighthouse_attention(query, key, value, CONFIG, sinks=sinks, **how)


def on_rank(group: Group, inputs: list[Tensor], sinks: Tensor, comm_type: str) -> list[Tensor]:
    return answers(partial(lighthouse, group, comm_type), *shards_of(group, inputs), sinks)


def windowed_on_rank(group: Group, inputs: list[Tensor], sinks: Tensor, window: int, comm_type: str) -> list[Tensor]:
    shards, exchange = shards_of(group, inputs), Exchange.over(group)
    assert exchange is not None
    return answers(
        sharded_attention("auto", *shards[:2], exchange, comm_type, SCALE, window=window, sinks=True), *shards, sinks
    )


def assert_same(by_rank: list[list[Tensor]], expected: list[Tensor]) -> None:
    """Of all ranks, whose gradients of the sinks add up."""
    *found, d_sinks = zip(*by_rank, strict=True)
    for x, y in zip([*map(whole, found), torch.stack(d_sinks).sum(0)], expected, strict=True):
        assert_close(x, y, "ranks float64")


def test_lighthouse_with_sinks_is_its_formula_over_the_gathered_rows() -> None:
    inputs = inputs_of(PROBLEM)
    sinks = sinks_like(inputs[0])

    def expected(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return lighthouse_attention(query, key, value, CONFIG, attend=lambda q, k, v: formula(q, k, v, sinks))

    found = on_rank(None, inputs, sinks, "p2p")
    for x, y in zip(found, answers(expected, *inputs, sinks), strict=True):
        assert_close(x, y, "float64")
    assert found[-1][1:].abs().min() > 1e-3  # else no sink would have mattered


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
def test_sinks_over_ranks(size: int, comm_type: str) -> None:
    """Once, after the last step: a rank has the rows of some tokens, or some heads."""
    inputs = inputs_of(replace(PROBLEM, groups=4))
    sinks = sinks_like(inputs[0])
    assert_same(run_ranks(size, on_rank, inputs, sinks, comm_type), on_rank(None, inputs, sinks, "p2p"))


@pytest.mark.parametrize(
    ("size", "window"), [(2, 0), (2, 5), (4, 8), (4, 19), (2, 100)], ids=["itself", "less", "a chunk", "more", "all"]
)
def test_windows_over_ranks(size: int, window: int) -> None:
    """Of fewer tokens than a chunk holds, as many, more, and all; whatever the scheme."""
    inputs = inputs_of(PROBLEM)
    sinks = sinks_like(inputs[0])
    found = run_ranks(size, windowed_on_rank, inputs, sinks, window, "a2a" if window == 5 else "p2p")
    assert_same(found, answers(partial(formula, window=window), *inputs, sinks))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_backends_without_a_log_sum_exp_attend_to_a_key_row(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 2's place, of 12 channels, is taken by torch's attention, which is given no more than it would be."""
    wide = []

    def inner(name: str, query: Tensor, key: Tensor, scale: float) -> Callable[..., Tensor]:
        assert name == "fa2"
        wide.append(query.shape[-1])
        return lambda q, k, v: BACKENDS["sdpa"].attend(q, k, v, scale)

    monkeypatch.setattr(sinks_of, "inner_attention", inner)
    inputs = inputs_of(replace(PROBLEM, dim=12), dtype)
    sinks = sinks_like(inputs[0])
    exact = [x.double() for x in (*inputs, sinks)]
    found = answers(sinks_of.sinks_attention("fa2", *inputs[:2], SCALE), *inputs, sinks)
    assert wide == [20]
    for x, y in zip(found, answers(formula, *exact), strict=True):
        if dtype == "float64":
            assert_close(x, y, dtype)
        else:
            assert (x.double() - y).norm() < 2**-7 * y.norm() + math.ulp(1)


def test_what_sinks_do_not_go_with() -> None:
    query, key, value, _ = inputs_of(PROBLEM)
    with pytest.raises(ValueError, match=r"sinks must be \[4\] on cpu"):
        lighthouse_attention(query, key, value, CONFIG, sinks=torch.zeros(2))
    with pytest.raises(ValueError, match="leave out `sinks` or `attend`"):
        lighthouse_attention(query, key, value, CONFIG, sinks=torch.zeros(4), attend=lambda q, k, v: q)
    with pytest.raises(ValueError, match="leave out `sinks` or `cu_seqlens`"):
        lighthouse_attention(query, key, value, CONFIG, sinks=torch.zeros(4), cu_seqlens=torch.tensor([0, 64]))
