"""Wall against golden vectors, its formula, and what follows from it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lighthouse.wall.attention import wall_attention
from megatron_lighthouse.wall.cut import Step
from megatron_lighthouse.wall.gates import LogSigmoid
from tests.tolerances import assert_close
from tests.wall.oracle import formula, inputs, with_grads

GOLDEN = Path(__file__).parents[1] / "golden"
INITIAL = -3.35e-4
"""The gates of a bias of 8."""


@pytest.fixture(params=[4096, 5], ids=["one piece", "pieces of five"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "TOKENS", request.param)


@pytest.mark.parametrize("name", ["wall_a", "wall_b", "wall_c"])
def test_the_golden_vectors(name: str, pieces: None) -> None:
    """Of fla's naive reference; c has scalar gates and sinks, b short documents."""
    case = {key: torch.from_numpy(x) for key, x in np.load(GOLDEN / f"{name}.npz").items()}
    given = [case[key].double() for key in ("q", "k", "v", "g", "g_scalar", "sink", "dout") if key in case]
    tensors = [x if x.dim() == 1 else x.transpose(0, 1) for x in given]
    how: dict[str, Any] = {"softmax_scale": float(case["scale"]), "cu_seqlens": case.get("cu_seqlens")}
    names = [key for key in ("out", "dq", "dk", "dv", "dg", "dgs", "dsink") if key in case]
    for key, found in zip(names, with_grads(wall_attention, tensors, **how), strict=True):
        assert_close(found if found.dim() == 1 else found.transpose(0, 1), case[key], "ranks float64")


@pytest.mark.parametrize("gate", [0.0, INITIAL, -0.1, -1.3, -9.0])
@pytest.mark.parametrize("how", [{}, {"window": 1}, {"window": 7}], ids=str)
def test_the_formula(gate: float, how: dict[str, Any], pieces: None) -> None:
    """K that is not V, grouped heads; gates of a query head or of a group, with and without scalar gates and sinks."""
    for more in ({}, {"tied": True, "scalar": -0.2, "sink": True}):
        tensors = inputs(23, 2, 4, 2, (5, 3), gate=gate, **more)
        expected = with_grads(formula, tensors, softmax_scale=0.7, **how)
        for found, one in zip(with_grads(wall_attention, tensors, softmax_scale=0.7, **how), expected, strict=True):
            assert_close(found, one, "ranks float64")


def test_strides_change_nothing(pieces: None) -> None:
    tensors = inputs(12, 2, 4, 2, (6, 6))
    strided = [x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for x in tensors]
    for found, expected in zip(with_grads(wall_attention, strided), with_grads(wall_attention, tensors), strict=True):
        assert_close(found, expected, "float64")


def test_without_gates_it_is_dense(pieces: None) -> None:
    query, key, value, gate, _ = inputs(20, 2, 4, 2, (8, 8), gate=0.0)
    heads_first = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    dense = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    assert_close(wall_attention(query, key, value, gate), dense.permute(2, 0, 1, 3), "float64")


def test_one_gate_for_a_group_is_the_same_for_its_heads(pieces: None) -> None:
    query, key, value, gate, grad = inputs(13, 2, 6, 2, (4, 4), tied=True)
    tied = with_grads(wall_attention, [query, key, value, gate, grad])
    spread = with_grads(wall_attention, [query, key, value, gate.repeat_interleave(3, 2), grad])
    spread[-1] = spread[-1].unflatten(2, (2, 3)).sum(3)
    for found, expected in zip(tied, spread, strict=True):
        assert_close(found, expected, "float64")


def test_documents_are_as_alone(pieces: None) -> None:
    """Of one token, of none, and across pieces; and the gates of a document's first token have a gradient of exactly 0."""
    tensors = inputs(30, 1, 4, 2, (6, 3), scalar=-0.1)
    places = [0, 1, 2, 12, 12, 30]
    found = with_grads(wall_attention, tensors, cu_seqlens=torch.tensor(places))
    for begin, end in pairwise(places):
        alone = with_grads(wall_attention, [x[begin:end] for x in tensors]) if end > begin else []
        for whole, one in zip(found, alone, strict=False):
            assert_close(whole[begin:end], one, "ranks float64")
    *_, of_gate, of_scalar = found
    first = torch.tensor(places[:-1])
    assert not of_gate[first].any()
    assert not of_scalar[first].any()
    assert of_gate[3:12].abs().min() > 0


def test_what_one_row_gives_another_takes(pieces: None) -> None:
    """The sums of q·dq - k·dk over a document are 0, channel by channel: the gates' prefix has no absolute place."""
    tensors = inputs(22, 1, 2, 2, (4, 4), sink=True)
    bounds = torch.tensor([0, 9, 22])
    _, dq, dk, *_ = with_grads(wall_attention, tensors, cu_seqlens=bounds)
    change = tensors[0] * dq - tensors[1] * dk
    for begin, end in pairwise(bounds.tolist()):
        assert_close(change[begin:end].sum(0), torch.zeros(1, 2, 4), "float64")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [0.0, -50.0, -1e30, -torch.inf])
def test_gates_of_any_size_are_finite(gate: float, dtype: torch.dtype, pieces: None) -> None:
    """A channel that has faded at once leaves a logit of 0 to all keys but a row's own."""
    *tensors, grad = (x.to(dtype) for x in inputs(17, 2, 2, 1, (4, 3)))
    tensors[3] = torch.full((17, 2, 2, 4), gate, dtype=torch.promote_types(dtype, torch.float32))
    scalar = tensors[3][..., 0]
    for given in ([*tensors, grad], [*tensors, scalar, grad]):
        found = with_grads(wall_attention, given)
        assert all(x.isfinite().all() for x in found)
    if gate == -torch.inf:
        assert_close(found[0], tensors[2].expand(17, 2, 2, 3), "float64")  # the scalar gate leaves a row itself alone


@pytest.mark.parametrize(("gate", "most"), [(INITIAL, 0.03), (-2.0, 0.06)])
def test_gradients_of_gates_in_bfloat16(gate: float, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across anchors, with keys, queries and their gradients rounded there. The public kernels: 3 % and 18 %."""
    monkeypatch.setattr(Step, "TOKENS", 64)
    *rows, of_gate, grad = inputs(256, 1, 2, 1, (16, 16), gate=gate)
    query, key, value, grad = (x.bfloat16() for x in (*rows, grad))
    found = with_grads(wall_attention, [query, key, value, of_gate.float(), grad])[-1]
    expected = with_grads(formula, [x.double() for x in (query, key, value, of_gate, grad)])[-1]
    assert (found - expected).norm() / expected.norm() < most


Q, K, V = (8, 1, 4, 6), (8, 1, 2, 6), (8, 1, 2, 5)


@pytest.mark.parametrize(
    ("shapes", "how", "says"),
    [
        ((Q, K, (8, 1, 4, 5), Q), {}, r"expected query \[N, B, H, D\] and key and value of one shape"),
        ((Q, (8, 1, 2, 5), V, Q), {}, "must agree in N, B and D"),
        ((Q, (8, 1, 3, 6), (8, 1, 3, 6), Q), {}, "the query heads .* must be a multiple of the key/value heads"),
        ((Q, K, V, (8, 1, 1, 6)), {}, r"gate must be \(8, 1, 4, 6\) or \(8, 1, 2, 6\), got \(8, 1, 1, 6\)"),
        ((Q, K, V, (8, 1, 4)), {}, r"gate must be \(8, 1, 4, 6\)"),
        ((Q, K, V, Q), {"scalar_gate": torch.zeros(8, 1, 2)}, r"scalar_gate must be \(8, 1, 4\), got \(8, 1, 2\)"),
        ((Q, K, V, Q), {"scalar_gate": torch.ones(8, 1, 4)}, "scalar_gate must be natural logarithms <= 0, got up to 1"),
        ((Q, K, V, Q), {"sink": torch.zeros(2)}, r"sink must be \(4,\), got \(2,\)"),
        ((Q, K, V, Q), {"sink": torch.zeros(4, dtype=torch.int64)}, "sink must be of a floating dtype on cpu"),
        ((Q, K, V, Q), {"window": 0}, "window 0 must be at least 1"),
        ((Q, K, V, Q), {"cp_comm_type": "mail"}, "cp_comm_type mail is not known"),
        ((Q, K, V, Q), {"cu_seqlens": torch.tensor([0, 5, 4, 8])}, "cu_seqlens must rise from 0 to the 8 tokens"),
        ((Q, K, V, Q), {"cu_seqlens": torch.tensor([0.0, 8.0])}, "must be .* int32 or int64"),
        (((8, 2, 4, 6),) * 4, {"cu_seqlens": torch.tensor([0, 8])}, "B = 1, got B = 2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(shapes: tuple[tuple[int, ...], ...], how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wall_attention(*(torch.zeros(shape) for shape in shapes), **how)


@pytest.mark.parametrize(
    ("which", "bad", "says"),
    [
        ("query", [1.0], "query must be a torch.Tensor, not a list"),
        ("gate", None, "gate must be a torch.Tensor, not a NoneType"),
        ("scalar_gate", -0.1, "scalar_gate must be a torch.Tensor, not a float"),
        ("sink", "zero", "sink must be a torch.Tensor, not a str"),
        ("softmax_scale", "0.5", "softmax_scale must be a number, not a str"),
        ("window", 2.5, "window must be a whole number, not a float"),
        ("window", True, "window must be a whole number, not a bool"),
        ("cu_seqlens", [0, 8], "cu_seqlens must be a torch.Tensor, not a list"),
        ("cp_group", "all", r"cp_group must be a torch\..*ProcessGroup, not a str"),
    ],
)
def test_arguments_of_another_type_are_refused(which: str, bad: Any, says: str) -> None:
    given = dict(zip(("query", "key", "value", "gate"), (torch.zeros(x) for x in (Q, K, V, Q)), strict=True))
    with pytest.raises(TypeError, match=says):
        wall_attention(**{**given, which: bad})


def test_nothing_to_attend_to_is_refused() -> None:
    for shape in ((0, 1, 2, 4), (8, 0, 2, 4), (8, 1, 2, 0)):
        query, value = torch.zeros(shape), torch.zeros(*shape[:3], 3)
        with pytest.raises(ValueError, match="N, B and D must be at least 1"):
            wall_attention(query, query, value, query)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, 0, -0.5])
def test_a_scale_that_is_not_above_0_and_finite_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=f"softmax_scale {scale} must be above 0 and finite"):
        wall_attention(*(torch.zeros(x) for x in (Q, K, V, Q)), softmax_scale=scale)


@pytest.mark.parametrize("bad", [1e-3, torch.nan])
def test_gates_above_0_are_refused(bad: float) -> None:
    query, key, value, gate, _ = inputs(8, 1, 2, 2, (4, 4))
    gate[3, 0, 1, 2] = bad
    with pytest.raises(ValueError, match="gate must be natural logarithms <= 0, got up to"):
        wall_attention(query, key, value, gate)


def test_a_second_derivative_is_refused(pieces: None) -> None:
    leaves = [x.requires_grad_() for x in inputs(6, 1, 2, 2, (4, 4))[:4]]
    (grad,) = torch.autograd.grad(wall_attention(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_few_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.wall.earlier import Plain
    from megatron_lighthouse.wall.reference import Size

    tensors = inputs(23, 2, 4, 2, (5, 3), scalar=-0.1)
    expected: list[Tensor] = with_grads(wall_attention, tensors, window=np.int64(12))
    monkeypatch.setattr(Step, "TOKENS", 8)
    monkeypatch.setattr(Plain, "ELEMENTS", 150)
    monkeypatch.setattr(Size, "ELEMENTS", 40)
    for found, one in zip(with_grads(wall_attention, tensors, window=12), expected, strict=True):
        assert_close(found, one, "float64")


@pytest.mark.parametrize("most", [0.0, 0.86])
def test_gates_of_logits(most: float) -> None:
    """The hand-written gradient, and a soft clamp that no gate passes."""
    logits = torch.tensor([-40.0, -2.0, 0.0, 3.0, 8.0, 40.0], dtype=torch.float64, requires_grad=True)
    gates = LogSigmoid(most)(logits)
    assert torch.autograd.gradcheck(LogSigmoid(most), logits)
    assert (gates <= 0).all()
    if most:
        assert (gates >= -most).all()
    assert LogSigmoid(most)(logits.bfloat16()).dtype == torch.float32
