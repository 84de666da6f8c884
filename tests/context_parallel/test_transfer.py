"""What a transfer puts together from the rows of this rank and those of others, by the formula."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from megatron_lighthouse.context_parallel import transfer
from megatron_lighthouse.kernels import placed
from megatron_lighthouse.kernels.placed import MOST
from tests.steps import DEVICE

WAYS = pytest.mark.parametrize("way", [transfer, placed], ids=["torch", "kernel"])


@WAYS
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("widths", [(5,), (48, 16, MOST + 8), (3, 5, 7, 11)], ids=str)
@pytest.mark.parametrize(("own", "others"), [(37, 11), (0, 9), (9, 0)])
def test_rows_are_placed_and_copies_are_added_up(
    way: ModuleType, copies: int, widths: tuple[int, ...], own: int, others: int
) -> None:
    """Whole numbers, whose sums are exact; rows are slices of wider ones."""
    torch.manual_seed(1)
    theirs = torch.randint(-9, 9, (others, sum(widths)), device=DEVICE).bfloat16()
    slots = torch.randint(-1 - others, own, (copies, 70), device=DEVICE)
    rows = [torch.randint(-9, 9, (own, 2 * width), device=DEVICE).bfloat16()[:, width:] for width in widths]
    for mine, sent, found in zip(rows, theirs.split(widths, 1), way.placed(rows, theirs, slots), strict=True):
        expected = torch.zeros(70, mine.shape[1], dtype=torch.float64)
        for row in slots.tolist():
            for i, slot in enumerate(row):
                if slot != -1:
                    expected[i] += (mine[slot] if slot >= 0 else sent[-2 - slot]).double().cpu()
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.double().cpu(), expected)


@WAYS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("leaves", [0, 23])
def test_rows_that_leave_are_side_by_side(way: ModuleType, dtype: torch.dtype, leaves: int) -> None:
    rows = [torch.randn(30, 2 * width, device=DEVICE)[:, width:] for width in (4, 16, 9, 1)]
    leaving = torch.randint(0, 30, (leaves,), device=DEVICE, dtype=dtype)
    assert torch.equal(way.taken(rows, leaving), torch.cat([x[leaving.long()] for x in rows], 1))
