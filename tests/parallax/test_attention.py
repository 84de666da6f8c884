"""Parallax against golden vectors, the paper's formula, and what follows from it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lighthouse.parallax.attention import parallax_attention
from megatron_lighthouse.parallax.blocks import Plain
from tests.parallax.oracle import NAMES, formula, inputs, with_grads
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=["parallax_a", "parallax_b", "parallax_c"])
def case(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return {name: torch.from_numpy(x) for name, x in np.load(GOLDEN / f"{request.param}.npz").items()}


@pytest.fixture
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plain, "ELEMENTS", 300)


def test_the_golden_vectors(case: dict[str, Tensor], few_rows_at_a_time: None) -> None:
    tensors = [case[name].double().transpose(0, 1) for name in ("q", "r", "k", "v", "dout")]
    how: dict[str, Any] = {"softmax_scale": float(case["scale"]), "cu_seqlens": case.get("cu_seqlens")}
    for name, found in zip(NAMES, with_grads(parallax_attention, tensors, **how), strict=True):
        assert_close(found.transpose(0, 1), case[name], "ranks float64")


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_the_formula(window: int | None, few_rows_at_a_time: None) -> None:
    tensors = inputs(29, 2, 6, 2, 5, r=1.0, mean=3.0)
    expected = with_grads(formula, tensors, scale=0.7, window=window)
    for found, one in zip(with_grads(parallax_attention, tensors, softmax_scale=0.7, window=window), expected, strict=True):
        assert_close(found, one, "ranks float64")


def test_strides_change_nothing() -> None:
    tensors = inputs(12, 2, 4, 2, 6)
    strided = [x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for x in tensors]
    for found, expected in zip(with_grads(parallax_attention, strided), with_grads(parallax_attention, tensors), strict=True):
        assert_close(found, expected, "float64")


def test_gradients_by_finite_differences() -> None:
    leaves = [x.requires_grad_() for x in inputs(7, 1, 4, 2, 3, mean=2.0)[:4]]
    assert torch.autograd.gradcheck(lambda *x: parallax_attention(*x, window=5), leaves)


def test_without_r_it_is_dense() -> None:
    query, r, key, value, _ = inputs(20, 2, 4, 2, 8, r=0.0)
    heads_first = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    dense = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    assert_close(parallax_attention(query, r, key, value), dense.permute(2, 0, 1, 3), "float64")


def test_a_vector_added_to_all_keys_changes_nothing() -> None:
    """To the bit where it can be: integer keys, less a mean that the dtype holds, are the same."""
    query, r, _, value, grad = (x.float() for x in inputs(32, 1, 2, 2, 8, r=3.0))
    key = torch.randint(-3, 4, (16, 1, 2, 8)).float().repeat(2, 1, 1, 1)
    key[16:] = -key[16:]  # of mean 0
    found = [with_grads(parallax_attention, [query, r, key + shift, value, grad]) for shift in (64.0, 1024.0)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_keys_that_share_a_mean_lose_nothing_in_half_precision(mean: float) -> None:
    """Sums are in fp32 here: what is left is what the keys themselves are rounded by."""
    tensors = [x.half().double() for x in inputs(64, 1, 2, 1, 16, r=3.0, mean=mean)]
    found = with_grads(parallax_attention, [x.half() for x in tensors])
    for one, expected in zip(found, with_grads(formula, tensors), strict=True):
        assert (one.double() - expected).norm() / expected.norm() < 1e-3


def test_documents_are_as_alone() -> None:
    """With means of their own: of one no token may enter another, not even by rounding."""
    tensors = inputs(30, 1, 4, 2, 6, r=1.0)
    places = [0, 1, 12, 12, 30]
    tensors[2][12:] += 1e6
    found = with_grads(parallax_attention, tensors, cu_seqlens=torch.tensor(places))
    for begin, end in pairwise(places):
        alone = with_grads(parallax_attention, [x[begin:end] for x in tensors]) if end > begin else []
        for whole, one in zip(found, alone, strict=False):
            assert_close(whole[begin:end], one, "ranks float64" if begin < 12 else "float32")


Q, K = (8, 1, 4, 6), (8, 1, 2, 6)


@pytest.mark.parametrize(
    ("shapes", "how", "says"),
    [
        ((Q, Q, K, (8, 1, 2, 5)), {}, r"key and value of one shape \[N, B, G, D\]"),
        ((Q, Q, (8, 1, 3, 6), (8, 1, 3, 6)), {}, "the query heads .* must be a multiple of the key/value heads"),
        ((Q, K, K, K), {}, r"r must be like the query, \(8, 1, 4, 6\) torch.float32 on cpu, got \(8, 1, 2, 6\)"),
        ((Q, Q, K, K), {"window": 0}, "window 0 must be at least 1"),
        ((Q, Q, K, K), {"cp_comm_type": "mail"}, "cp_comm_type mail is not known"),
        ((Q, Q, K, K), {"cu_seqlens": torch.tensor([0, 5, 4, 8])}, "cu_seqlens must rise from 0 to the 8 tokens"),
        ((Q, Q, K, K), {"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens must rise from 0 to the 8 tokens"),
        ((Q, Q, K, K), {"cu_seqlens": torch.tensor([0.0, 8.0])}, "must be .* int32 or int64"),
        (((8, 2, 4, 6),) * 4, {"cu_seqlens": torch.tensor([0, 8])}, "B = 1, got B = 2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(shapes: tuple[tuple[int, ...], ...], how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parallax_attention(*(torch.zeros(shape) for shape in shapes), **how)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"window": 2.5}, "window must be a whole number, not a float"),
        ({"cu_seqlens": [0, 8]}, "cu_seqlens must be a torch.Tensor, not a list"),
        ({"softmax_scale": True}, "softmax_scale must be a number, not a bool"),
    ],
)
def test_arguments_of_another_type_are_refused(how: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        parallax_attention(*(torch.zeros(x) for x in (Q, Q, K, K)), **how)


@pytest.mark.parametrize("which", range(4))
def test_mixed_dtypes_are_refused(which: int) -> None:
    tensors = inputs(8, 1, 2, 2, 4)[:4]
    tensors[which] = tensors[which].float()
    with pytest.raises(ValueError, match=r"must share one device and one dtype|r must be like the query"):
        parallax_attention(*tensors)


def test_a_second_derivative_is_refused() -> None:
    leaves = [x.requires_grad_() for x in inputs(6, 1, 2, 2, 4)[:4]]
    (grad,) = torch.autograd.grad(parallax_attention(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
