"""Scalar gates, and values that are not as wide as keys, by blocks of softmax attention that know neither."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.softmax.blocks import Cudnn
from megatron_lighthouse.softmax.blocks import Plain as PlainBlock
from megatron_lighthouse.wall import biased, implementations, layer
from megatron_lighthouse.wall.attention import wall_attention
from megatron_lighthouse.wall.cut import Step
from megatron_lighthouse.wall.earlier import Plain, Stock
from tests.context_parallel.shards import shards_of, whole
from tests.ranks import run_ranks
from tests.tolerances import assert_close
from tests.wall.oracle import formula, inputs, with_grads


def earlier(query: Tensor, value: Tensor, gate_heads: int, scale: float, biased: bool, masked: bool) -> Stock:
    """As on a GPU, with a block in plain PyTorch."""
    return Stock(PlainBlock(scale, None), scale, 16)


@pytest.fixture
def stock() -> Iterator[None]:
    """Over pieces of five."""
    with mock.patch.object(layer, "earlier_for", earlier), mock.patch.object(Step, "TOKENS", 5):
        yield


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("dims", [(5, 3), (3, 9), (4, 4)], ids=str)
@pytest.mark.parametrize("more", [{}, {"scalar": -0.2}, {"scalar": -3.0, "tied": True, "sink": True}], ids=str)
def test_the_formula(dims: tuple[int, int], more: dict[str, Any]) -> None:
    """With grouped heads, documents, and a scale that is no power of two."""
    tensors = inputs(23, 1, 4, 2, dims, **more)
    how = {"softmax_scale": 0.7, "cu_seqlens": torch.tensor([0, 2, 23])}
    expected = with_grads(formula, tensors, **how)
    for found, one in zip(with_grads(wall_attention, tensors, **how), expected, strict=True):
        assert_close(found, one, "ranks float64")


def on_rank(group: dist.ProcessGroup, tensors: list[Tensor], comm_type: str) -> list[Tensor]:
    rows = [x if x.dim() == 1 else shards_of(group, [x])[0] for x in tensors]
    with mock.patch.object(layer, "earlier_for", earlier), mock.patch.object(Step, "TOKENS", 5):
        return with_grads(wall_attention, rows, cp_group=group, cp_comm_type=comm_type)


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
def test_ranks_equal_one(comm_type: str) -> None:
    """Chunks of six tokens in two pieces."""
    tensors = inputs(24, 2, 4, 2, (5, 3), scalar=-0.2, sink=True)
    ranks = run_ranks(2, on_rank, tensors, comm_type)
    for expected, found in zip(with_grads(formula, tensors), zip(*ranks, strict=True), strict=True):
        together = sum(found) if expected.dim() == 1 else whole(found)
        assert_close(together, expected, "ranks float64")


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("gate", [-50.0, -1e30, -torch.inf])
def test_scalar_gates_of_any_size_leave_a_row_itself(gate: float) -> None:
    query, key, value, of_channels, grad = inputs(17, 2, 2, 1, (4, 3))
    scalar = torch.full((17, 2, 2), gate, dtype=torch.float64)
    found = with_grads(wall_attention, [query, key, value, of_channels, scalar, grad])
    assert_close(found[0], value.expand(17, 2, 2, 3), "float64")
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0884, 0.7, 1.0])
def test_biases_are_cut_without_loss(dtype: torch.dtype, scale: float) -> None:
    """Of 24 bits three of 8: a product with the queries' columns is the bias, but for the roundings of one in fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    bias = -torch.logspace(-6, 3.5, 200, dtype=wide).view(-1, 1, 1, 1)
    of_query, of_key = biased.columns(bias, scale, dtype)
    assert of_query.dtype == of_key.dtype == dtype
    made = scale * (of_key.double() @ of_query.double())
    assert ((made - bias.double().squeeze(-1)) / bias.double().squeeze(-1)).abs().max() < 4 * torch.finfo(wide).eps


@pytest.mark.parametrize(("scalar", "most"), [(-3.35e-4, 0.01), (-0.05, 0.01), (-1.0, 0.01)])
def test_gradients_of_scalar_gates_in_bfloat16(scalar: float, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come back in channels of queries and keys, rounded as these: not worse than those of channels."""
    monkeypatch.setattr(Step, "TOKENS", 64)
    monkeypatch.setattr(layer, "earlier_for", lambda *given: Stock(PlainBlock(given[3], None), given[3], 24))
    *rows, of_gate, of_scalar, grad = inputs(256, 1, 2, 1, (16, 16), gate=-3.35e-4, scalar=scalar)
    query, key, value, grad = (x.bfloat16() for x in (*rows, grad))
    found = with_grads(wall_attention, [query, key, value, of_gate.float(), of_scalar.float(), grad])[-1]
    expected = with_grads(formula, [x.double() for x in (query, key, value, of_gate, of_scalar, grad)])[-1]
    assert (found - expected).norm() / expected.norm() < most


class OfGpu(Tensor):
    """Says that it is of a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]


def test_what_is_taken_where(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of a GPU whose kernels take 256 channels."""
    asked = []

    def block_for(name: str, query: Tensor, key: Tensor, scale: float) -> Cudnn | PlainBlock:
        asked.append((query.shape[2:], key.shape[2:]))
        return (Cudnn if query.shape[3] <= 256 else PlainBlock)(scale, None)

    monkeypatch.setattr(implementations, "block_for", block_for)

    def taken(dim: int, value_dim: int, **how: bool) -> tuple[type, int | None]:
        query, value = (torch.empty(8, 1, heads, n).as_subclass(OfGpu) for heads, n in ((8, dim), (2, value_dim)))
        found = implementations.earlier_for(query, value, 2, 0.1, **{"biased": False, "masked": False, **how})
        return type(found), getattr(found, "width", None)

    assert taken(128, 128) == (Stock, None)
    assert taken(64, 128) == taken(128, 64) == (Stock, 128)
    assert taken(128, 128, biased=True) == (Stock, 136)
    assert taken(60, 64, biased=True) == (Stock, 64)
    assert taken(256, 256, biased=True) == (Plain, None)
    assert taken(128, 128, masked=True) == (Plain, None)
    assert asked[:3] == [((8, 128), (2, 128))] * 3
    assert asked[3] == ((8, 136), (8, 136)), "a bias of each query head"
    assert any("slowly: with scalar gates its rows take 264 channels" in message for message in caplog.messages)
