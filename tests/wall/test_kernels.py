"""The kernels of Wall's diagonal against float64, at small sizes under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.kernels.wall import backward, forward, suffix_sums, tiles
from megatron_lighthouse.kernels.wall.tiles import Blocks
from tests.steps import DEVICE, poisoned
from tests.test_offsets import NEEDED, far
from tests.wall.kernel_oracle import inputs, with_grads

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's: pairs that are not meant overflow, and are left out
DOCUMENTS = torch.tensor([0] + [1] * 20 + [21] * 12 + [33] + [34] * 16, dtype=torch.int32)
WINDOW = (torch.arange(50) - 22).clamp(min=0).int()
INITIAL = -3.35e-4
HALF, FINER = (torch.bfloat16, 1) if DEVICE == "cuda" else (torch.float16, 8)
"""fp16 under the interpreter, which has no bf16, and so an eighth of what bf16 may. On a GPU fp16 is refused."""


def small_tiles(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    if DEVICE == "cpu":
        for name in ("forward", "backward", "suffix"):
            module = sys.modules[f"megatron_lighthouse.kernels.wall.{name}"]
            monkeypatch.setattr(module, "blocks_of", lambda kernel, dim, itemsize: Blocks(rows, 4, 1))


def run(
    tensors: list[Tensor],
    first: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    whole: tuple[Tensor, Tensor] | None = None,
    scale: float = 0.3,
) -> list[Tensor]:
    """As `with_grads`, by the kernels."""
    query, key, value, gate, *scalar, grad = (
        x.to(DEVICE, torch.float32 if 3 <= i < len(tensors) - 1 else dtype) for i, x in enumerate(tensors)
    )
    first = torch.zeros(len(query), dtype=torch.int32) if first is None else first
    given = (query, key, value, gate, scalar[0] if scalar else None)
    with poisoned():
        out, lse = forward(*given, scale, first.to(DEVICE))
        of_rows, of_all = (out, lse) if whole is None else (whole[0].to(out), whole[1].to(lse))
        grads = backward(grad, *given, of_rows, of_all, scale, first.to(DEVICE))
    return [out, lse, *(x for x in grads if x is not None)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of each, relative to its norm."""
    return [float((a.double().cpu() - b).norm() / b.norm().clamp(min=1e-300)) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    ("shape", "gate", "scalar", "first"),
    [
        pytest.param((40, 2, 2, 1, 20, 12), -0.1, True, None, id="groups, batch, K and V no powers of two"),
        pytest.param((50, 1, 1, 1, 8, 24), -2.0, True, torch.maximum(DOCUMENTS, WINDOW), id="documents and a window"),
        pytest.param((50, 1, 1, 1, 8, 8), -9.0, False, WINDOW, id="strong gates"),
        pytest.param((40, 1, 2, 2, 16, 8), 0.0, False, None, id="no gates"),
    ],
)
def test_float32(shape: tuple[int, ...], gate: float, scalar: bool, first: Tensor | None) -> None:
    tensors = inputs(*shape, gate, scalar)  # type: ignore[arg-type]
    found, expected = run(tensors, first), with_grads(tensors, 0.3, first)
    assert max(errors(found, expected)) < 3e-6


@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 31, 33])
def test_tiles_that_are_not_full(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published kernels give NaN there once a tile decays beyond 2^-128."""
    small_tiles(monkeypatch, 16)
    tensors = inputs(tokens, 1, 1, 1, 8, 8, -9.0)
    found, expected = run(tensors), with_grads(tensors, 0.3)
    for a, b in zip(found, expected, strict=True):
        assert float((a.double().cpu() - b).abs().max()) < 3e-6 * max(1.0, float(b.abs().max()))


def test_sums_over_documents_of_many_tiles() -> None:
    rows = 1200
    sums = torch.randn(rows, 1, 2, 8, dtype=torch.float64)
    bounds = [0, 5, 31, 32, 101, 1190, rows]
    first = torch.cat([torch.full((end - begin,), begin) for begin, end in pairwise(bounds)]).int()
    found = suffix_sums(sums.float().to(DEVICE), first.to(DEVICE))
    expected = torch.cat([part.flip(0).cumsum(0).flip(0) for part in sums.split([b - a for a, b in pairwise(bounds)])])
    expected[bounds[:-1]] = 0
    assert float((found.double().cpu() - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_gates_without_end_and_documents_of_one_token() -> None:
    tensors = inputs(40, 1, 1, 1, 8, 8, -0.3, scalar=True)
    for i in (3, 4):
        tensors[i][[0, 5, 6, 17, 32, 33]] = -torch.inf
        tensors[i][20] = -1e30
    found, expected = run(tensors), with_grads(tensors, 0.3)
    assert max(errors(found, expected)) < 3e-6
    out, _, dq, dk, _, dg, d_scalar = run(tensors, torch.arange(40, dtype=torch.int32))
    assert torch.equal(out.cpu(), tensors[2].float())
    assert float(dq.abs().max()) < 1e-6 > float(dk.abs().max())
    assert not dg.any()
    assert not d_scalar.any()


def test_rows_that_see_other_keys_too() -> None:
    """The output and the log-sum-exp are then of all: what the diagonal's weights sum to is less than 1."""
    tensors = inputs(40, 1, 2, 1, 8, 8, -0.1, scalar=True)
    out, lse, *_ = with_grads(tensors, 0.3)
    whole = (out.flip(0), lse + 0.7)
    assert max(errors(run(tensors, whole=whole), with_grads(tensors, 0.3, whole=whole))[2:]) < 3e-6


@pytest.mark.parametrize(("gate", "bar"), [(INITIAL, 0.03), (-0.1, 0.03), (-2.0, 0.06)])
def test_gradients_of_gates_in_16_bits(gate: float, bar: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published kernels: 3 and 18 % in bf16."""
    small_tiles(monkeypatch, 32)
    tensors = [x if i == 3 else x.to(HALF).double() for i, x in enumerate(inputs(96, 1, 1, 1, 16, 16, gate))]
    found = dict(
        zip(("out", "lse", "dq", "dk", "dv", "dg"), errors(run(tensors, dtype=HALF), with_grads(tensors, 0.3)), strict=True)
    )
    assert found["dg"] < bar / FINER
    assert max(found.values()) < bar / FINER


def test_a_pair_adds_the_same_to_both_sides_of_a_gate() -> None:
    """So nothing of rounding is left to walk: where no pair crosses a token, its gate's gradient is what fp32 sums round."""
    tensors = [x if i == 3 else x.to(HALF).double() for i, x in enumerate(inputs(64, 1, 1, 1, 16, 16, -0.1))]
    tensors[3][32] = -torch.inf
    dg = run(tensors, dtype=HALF)[5]
    assert float(dg[32].abs().max()) < 2e-6 * float(dg.abs().max())


def test_strides_and_repeats_give_the_same_bits() -> None:
    tensors = inputs(12, 2, 2, 1, 8, 8, -0.5, scalar=True)
    strided = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in tensors]  # the last dimension is not contiguous
    sliced = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in tensors]
    first = run(tensors)
    for others in (tensors, strided, sliced):
        assert all(map(torch.equal, run(others), first))


@pytest.mark.gpu
def test_a_hundred_repeats_give_the_same_bits() -> None:
    tensors = inputs(96, 1, 4, 2, 64, 64, -0.01, scalar=True)
    first = run(tensors, dtype=torch.bfloat16)
    assert all(all(map(torch.equal, run(tensors, dtype=torch.bfloat16), first)) for _ in range(100))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["tokens", "batch", "heads"])
def test_tensors_that_32_bits_do_not_span(dim: int) -> None:
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip("a GPU has what is allocated, touched or not: 40 GiB")
    near = [x.to(DEVICE, HALF) for x in inputs(8, 2, 2, 2, 8, 8, -0.3)]
    first = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    found = []
    for query, key, value, gate, grad in (near, far(dim, near)):
        out, lse = forward(query, key, value, gate, None, 0.3, first)
        found.append([out, lse, *backward(grad, query, key, value, gate, None, out, lse, 0.3, first)[:4]])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("wide", "blocks"), [(False, (128, 256)), (True, (64, 256))])
def test_near_has_wide_blocks_in_16_bits(wide: bool, blocks: tuple[int, int]) -> None:
    constants = tiles.near_constants(tiles.constants(64, 200, 0.125, False, wide, 32))
    assert (constants["BLOCK_K"], constants["BLOCK_V"]) == blocks
    assert list(constants) == list(tiles.constants(64, 200, 0.125, False, wide, 32))  # the kernel's order


def test_blocks_go_by_dimension_and_dtype_alone() -> None:
    for dim in range(32, 257, 8):
        for itemsize in (2, 4):
            rows = {tiles.blocks_of(kernel, dim, itemsize).rows for kernel in ("prepare", "forward", "near", "queries", "keys")}
            assert rows < {16, 32, 64}
            assert len(rows) == 1
