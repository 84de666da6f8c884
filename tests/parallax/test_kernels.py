"""The kernels against float64, at small sizes under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import functools
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.kernels.parallax import backward, forward, tiles
from megatron_lighthouse.kernels.parallax.tiles import Blocks
from megatron_lighthouse.parallax import attention, layer
from megatron_lighthouse.parallax.attention import parallax_attention
from megatron_lighthouse.parallax.implementations import implementation_for
from tests.parallax.oracle import formula, inputs, with_grads
from tests.steps import DEVICE, poisoned
from tests.test_offsets import NEEDED, far


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function by the kernels, in small tiles, so that there are several."""

    monkeypatch.setattr(attention, "build", functools.partial(layer.build, kernels="triton"))
    if DEVICE == "cpu":
        for name in ("forward", "backward"):
            module = sys.modules[f"megatron_lighthouse.kernels.parallax.{name}"]
            monkeypatch.setattr(
                module, "blocks_of", lambda kernel, dim, itemsize, hopper: Blocks(32 if kernel == "forward" else 16, 16, 4, 1)
            )


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of each, relative to its norm."""
    return [float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


def on_device(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(DEVICE, dtype) for x in tensors]


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "groups, a dimension that is no power of two": ((44, 1, 4, 2, 20), {}),
    "a window, batch": ((53, 2, 1, 1, 16), {"window": 21}),
    "a window within a tile": ((40, 1, 1, 1, 8), {"window": 3}),
    "fewer rows than a tile": ((9, 1, 2, 1, 48), {"softmax_scale": 0.3}),
}


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    shape, how = CASES[name]
    tensors = inputs(*shape, r=1.0, mean=2.0)
    expected = with_grads(formula, tensors, scale=how.get("softmax_scale"), window=how.get("window"))
    with poisoned():
        found = with_grads(parallax_attention, on_device(tensors, torch.float32), **how)
    assert max(errors(found, expected)) < 3e-6


@pytest.mark.parametrize("window", [None, 13])
def test_documents_as_alone(window: int | None) -> None:
    """Shorter and longer than a tile, none at all, and keys whose means lie far apart: none enters another's."""
    places = [0, 5, 5, 21, 59]
    tensors = inputs(59, 1, 2, 1, 12, r=1.0)
    for number, (begin, end) in enumerate(pairwise(places)):
        tensors[2][begin:end] += 40.0 * number
    bounds = torch.tensor(places, device=DEVICE)
    with poisoned():
        found = with_grads(parallax_attention, on_device(tensors, torch.float32), cu_seqlens=bounds, window=window)
    for begin, end in pairwise(places):
        if end > begin:
            expected = with_grads(formula, [x[begin:end] for x in tensors], window=window)
            assert max(errors([x[begin:end] for x in found], expected)) < 1e-5


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_keys_that_share_a_mean_cost_nothing_in_float16(size: float) -> None:
    """fp16, for the interpreter cuts bf16 off. Uncentred, dq and dr are off tenfold; of few rows errors scatter by a fifth."""
    found = []
    for mean in (0.0, 10.0):
        tensors = [x.half().double() for x in inputs(64, 1, 1, 1, 32, r=size, mean=mean)]
        found.append(errors(with_grads(parallax_attention, on_device(tensors, torch.float16)), with_grads(formula, tensors)))
    assert max(found[0]) < 5e-4
    assert all(shared <= 1.3 * alone for alone, shared in zip(*found, strict=True))


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_the_output_is_rounded_once(size: float) -> None:
    """fp16, beside dense attention that rounds its weights and its output. A covariance rounded before that: 1.5 times."""
    query, r, key, value, _ = (x.half().double() for x in inputs(96, 1, 1, 1, 64, r=size))
    nothing = torch.zeros_like(r)
    exact, dense = (formula(query, x, key, value) for x in (r, nothing))
    place = torch.arange(len(query))
    logits = torch.einsum("nd,md->nm", query[:, 0, 0], key[:, 0, 0]) / 8
    weights = (logits - logits.amax(1, keepdim=True)).exp().masked_fill(place > place.unsqueeze(1), 0)
    rounded = (weights.half().double() @ value[:, 0, 0] / weights.sum(1, keepdim=True)).half().double()
    found = parallax_attention(*on_device([query, r, key, value], torch.float16))
    ours, theirs = errors([found, rounded.view_as(dense)], [exact, dense])
    assert ours < 1.3 * theirs


def test_strides_and_repeats_give_the_same_bits() -> None:
    tensors = on_device(inputs(20, 2, 2, 1, 16), torch.float32)
    strided = [x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for x in tensors]  # the last dimension is not contiguous
    sliced = [torch.cat([x, x], 3)[..., : x.shape[3]] for x in tensors]
    first = with_grads(parallax_attention, tensors)
    for others in (tensors, strided, sliced):
        assert all(map(torch.equal, with_grads(parallax_attention, others), first))


def test_bulk_copies_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Hopper, which the interpreter carries out too, of a dimension that is no power of two."""
    tensors = on_device(inputs(33, 1, 1, 1, 24), torch.float16)
    found = [with_grads(parallax_attention, tensors, window=21)]
    for name in ("forward", "backward"):
        monkeypatch.setattr(sys.modules[f"megatron_lighthouse.kernels.parallax.{name}"], "in_bulk", lambda *x: DEVICE == "cpu")
    found.append(with_grads(parallax_attention, tensors, window=21))
    assert all(map(torch.equal, *found))


def test_bulk_copies_need_rows_16_bytes_apart() -> None:
    rows = torch.zeros(6, 2, 2, 20, dtype=torch.float16)
    assert tiles.apart(rows[..., :16].contiguous())
    assert not tiles.apart(rows), "40 bytes"
    assert tiles.apart(rows.new_zeros(6, 2, 2, 24)[..., :20])
    assert not tiles.apart(rows.new_zeros(6, 2, 2, 24)[..., 4:20]), "begins between"
    assert not tiles.apart(rows.new_zeros(1, 2, 2, 16).expand(6, -1, -1, -1)), "one row for all"
    assert not tiles.apart(rows.new_zeros(6, 2, 2, 16).float()), "fp32"


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["tokens", "batch", "heads"])
def test_tensors_that_32_bits_do_not_span(dim: int) -> None:
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip("a GPU has what is allocated, touched or not: 40 GiB")
    near = on_device(inputs(8, 2, 2, 2, 8), torch.float16)
    found = []
    for query, r, key, value, grad in (near, far(dim, near)):
        *averages, lse = forward(query, r, key, value, 0.3, None, True)
        value_mean, out, mean = averages
        given = (query, r), (key, value), (value_mean, out, mean), lse
        found.append([value_mean, out, mean, lse, *backward(grad, *given, 0.3, None, True)])
    assert all(map(torch.equal, *found))


def test_parts_of_the_keys() -> None:
    """As a ring calls them: rows that see all of other keys, merged with their own, and more keys than rows."""
    from megatron_lighthouse.context_parallel.parts import Mask
    from megatron_lighthouse.parallax.blocks import Kernels, Plain

    query, r, key, value, grad = inputs(48, 1, 2, 1, 16, r=1.0)
    rows, own, others = slice(32, None), Mask((1,), (1,)), Mask((1,), (0,))
    found = []
    for kind, dtype in ((Kernels, torch.float32), (Plain, torch.float64)):
        q, rr, k, v, g = on_device([query[rows], r[rows], key, value, grad[rows]], dtype)
        block = kind(0.25)
        part = block.forward((q, rr), (k[rows], v[rows]), own)
        part.merge(block.forward((q, rr), (k[:32], v[:32]), others))
        near, far = block.backward(g, (q, rr), (k[:32], v[:32]), part, others)
        found.append([block.output(part), *near, *far])
    assert max(errors(found[0], [x.cpu() for x in found[1]])) < 3e-6


def test_where_they_cannot_run_it_is_said() -> None:
    with pytest.raises(
        ValueError, match=r"--parallax-kernels triton cannot run: they take bf16, fp16 and fp32, not torch.float64"
    ):
        implementation_for("triton", torch.device("cuda"), torch.float64, 64)
    with pytest.raises(ValueError, match="they take head dimensions up to 256, not 320"):
        implementation_for("triton", torch.device("cuda"), torch.bfloat16, 320)


@pytest.mark.parametrize("hopper", [False, True])
def test_tiles_of_the_backward_kernels_fit_each_other(hopper: bool) -> None:
    """What one writes of queries, in whole tiles, the other reads in whole tiles."""
    for dim in range(32, 257, 8):
        for itemsize in (2, 4):
            forward_tiles, queries, keys = (
                tiles.blocks_of(kernel, dim, itemsize, hopper) for kernel in ("forward", "queries", "keys")
            )
            assert queries.queries % keys.queries == 0
            assert min(*forward_tiles[:2], *queries[:2], *keys[:2]) >= 16
