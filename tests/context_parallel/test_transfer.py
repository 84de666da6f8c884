"""What a transfer puts together from the rows of this rank and those of others, by the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.context_parallel import transfer
from megatron_lighthouse.kernels.placed import MOST, placed
from tests.steps import DEVICE


@pytest.mark.parametrize("way", [transfer.placed, placed], ids=["torch", "kernel"])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("width", [5, 48, MOST + 8])
@pytest.mark.parametrize(("own", "others"), [(37, 11), (0, 9), (9, 0)])
def test_rows_are_placed_and_copies_are_added_up(way: object, copies: int, width: int, own: int, others: int) -> None:
    """Whole numbers, whose sums are exact; rows are slices of wider ones."""
    torch.manual_seed(1)
    mine, theirs = (torch.randint(-9, 9, (n, 2 * width), device=DEVICE).bfloat16() for n in (own, others))
    slots = torch.randint(-1 - others, own, (copies, 70), device=DEVICE)
    expected = torch.zeros(70, width, dtype=torch.float64)
    for row in slots.tolist():
        for i, slot in enumerate(row):
            if slot != -1:
                source: Tensor = mine[slot] if slot >= 0 else theirs[-2 - slot]
                expected[i] += source[width:].double().cpu()
    found = way(mine[:, width:], theirs[:, width:], slots)  # type: ignore[operator]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.double().cpu(), expected)
