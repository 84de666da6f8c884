"""Rows that decay to anchors, and keys that cross them: the kernels against the reference in float64; poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.kernels import wall as kernels
from megatron_lighthouse.wall import decay as reference
from megatron_lighthouse.wall.cut import Piece
from megatron_lighthouse.wall.pieces import Run, runs
from tests.steps import DEVICE

MOST = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
"""Of the largest element: sums of fp32 within tiles, and one rounding of the rows, which the interpreter cuts off."""


def rows_of(n: int, heads: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows whose heads are not contiguous."""
    return torch.randn(n, 2, dim, heads + 1, dtype=torch.float64).to(dtype)[..., :heads].transpose(2, 3)


def close(found: Tensor, expected: Tensor, most: float) -> None:
    assert found.shape == expected.shape
    assert float((found.double().cpu() - expected).abs().max()) <= most * float(expected.abs().max())


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "of_gates", "dim", "size", "step"),
    [
        (150, 2, 2, 16, 0.01, 70),
        (70, 4, 2, 24, 3.0, 70),
        (64, 1, 3, 8, 0.3, 24),
        (1, 2, 1, 16, 1.0, 4),
        pytest.param(2100, 1, 1, 3, 1e-3, 2100, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", MOST)
def test_decay(rows: int, heads: int, of_gates: int, dim: int, size: float, step: int, after: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, gate = rows_of(rows, heads, dim, dtype), -size * rows_of(rows, of_gates, dim).abs().float()
    given = [t.to(DEVICE) for t in (x, gate)]
    most = max(heads, of_gates)
    expected = torch.empty(rows, 2, most, dim, dtype=torch.float64)
    reference.decay(expected, x.double(), gate.double(), reference.tile_sums(gate, step), after, step)
    sums = kernels.tile_sums(given[1], step)
    out = torch.full((rows, 2, most, dim), torch.nan, dtype=dtype, device=DEVICE)
    kernels.decay(out, *given, sums, after, step)
    close(out, expected, MOST[dtype])
    total = rows_of(rows, most, dim, torch.float32).contiguous()
    added = total.clone().to(DEVICE)
    kernels.decay(added, *given, sums, after, step, add=True)
    close(added, total + expected, MOST[torch.float32])
    y, total = rows_of(rows, most, dim, dtype), rows_of(rows, of_gates, dim, torch.float32).contiguous()
    added, expected = total.clone().to(DEVICE), total.double()
    reference.decay_backward(expected, x.double(), y.double(), after, step)
    kernels.decay_backward(added, given[0], y.to(DEVICE), after, step)
    close(added, expected, MOST[torch.float32])
    close(sums.sum(1), reference.sums(gate, step), MOST[torch.float32])


def test_gates_of_minus_infinity() -> None:
    gate = torch.full((40, 1, 1, 4), -torch.inf)
    for after in (False, True):
        found, expected = torch.ones(40, 1, 1, 4, device=DEVICE), torch.ones(40, 1, 1, 4)
        sums = kernels.tile_sums(gate.to(DEVICE), 16)
        kernels.decay(found, found.clone(), gate.to(DEVICE), sums, after, 16)
        reference.decay(expected, expected.clone(), gate, sums, after, 16)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(("rows", "step", "later"), [(100, 40, 2), (64, 64, 0), (130, 130, 1), (7, 3, 3), (2100, 2100, 1)])
def test_crossing(rows: int, step: int, later: int) -> None:
    """`later`: pieces between these rows and the anchor."""
    torch.manual_seed(step)
    key, grad = rows_of(rows, 3, 8, torch.float32), rows_of(rows, 3, 8, torch.float32)
    between, total = -torch.rand(-(-rows // step) + later, 2, 3, 8, dtype=torch.float64), torch.randn(rows, 2, 3, 8)
    out, wide = torch.full((rows, 2, 3, 8), torch.nan, device=DEVICE), torch.empty(rows, 2, 3, 8, dtype=torch.float64)
    factors = kernels.cross(out, key.to(DEVICE), between.to(DEVICE), step)
    exact = reference.cross(wide, key.double(), between, step)
    close(factors, exact, MOST[torch.float32])
    close(out, wide, MOST[torch.float32])
    added, expected = total.clone().to(DEVICE), total.double()
    of_between, of_sums = torch.ones_like(between).to(DEVICE), torch.ones_like(between)
    kernels.cross_backward(added, of_between, out, grad.to(DEVICE), factors, step)
    reference.cross_backward(expected, of_sums, wide, grad.double(), exact, step)
    close(added, expected, MOST[torch.float32])
    close(of_between, of_sums, 10 * MOST[torch.float32])


def test_runs_join_what_follows() -> None:
    def of(*pieces: tuple[int, int, int]) -> list[Run]:
        return runs([Piece(number, begin, slice(begin, end)) for number, begin, end in pieces])

    assert of() == []
    assert of((0, 0, 4), (1, 4, 8), (2, 8, 10)) == [Run(0, 3, slice(0, 10), slice(0, 10), 4)]
    assert of((0, 2, 4), (1, 4, 8), (2, 8, 12)) == [
        Run(0, 1, slice(2, 4), slice(0, 2), 2),
        Run(1, 2, slice(4, 12), slice(2, 10), 4),
    ]
    assert [run.number for run in of((0, 0, 4), (1, 8, 12), (2, 12, 13), (3, 13, 17))] == [0, 1, 3]
    assert [run.lengths for run in of((4, 0, 4), (5, 4, 6), (9, 6, 10))] == [[4, 2], [4]]
