"""The kernels that gather rows for Wall against the reference in float64, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.lighthouse.attention import attended_rows, packed_rows
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.profiling.names import Mark, kernel_mark
from megatron_lighthouse.wall import gathered_reference as reference
from megatron_lighthouse.wall.gathered import by_kernels, by_kernels_backward
from tests.steps import DEVICE, poisoned
from tests.tolerances import assert_close
from tests.wall.oracle import inputs

SHAPES = {
    "three levels": (3, 2, 4),
    "two levels, by fours": (2, 4, 4),
    "four levels": (4, 2, 4),
    "by threes": (3, 3, 4),
}


def selected(name: str, shared: int, documents: bool = False) -> tuple[list[Tensor], Selection]:
    """Inputs in float32, gates of 4 heads; and what is selected of their 2 key/value heads."""
    levels, pooling, budget = SHAPES[name]
    window = pooling ** (levels - 1)
    config = LighthouseConfig(levels=levels, pooling=pooling, budget=budget, tile_budget=2, heads_per_selection=shared)
    rows = 83 if documents else 4 * window
    tensors = [x.float().to(DEVICE) for x in inputs(rows, 1 + (shared > 1), 4, 2, (6, 6))[:4]]
    if not documents:
        return tensors, attended_rows(*tensors[:3], config).selection
    bounds = torch.tensor([0, 5, 48, rows], dtype=torch.int32, device=DEVICE)
    found = packed_rows(*tensors[:3], config, bounds)
    assert isinstance(found.selection, Selection)
    return tensors, found.selection


def both(key: Tensor, gate: Tensor, selection: Selection, kind: str = "float32") -> None:
    """Rows, and gradients for random ones of these, as the reference makes them."""
    with poisoned():
        found = by_kernels(key, gate, selection)
    expected = reference.gather(key.double(), gate.double(), selection)
    grads = [torch.randn_like(x) for x in found]
    with poisoned():
        found += by_kernels_backward(key, gate, *grads, selection)
    wide = [x.double() for x in grads]
    expected += reference.gather_backward(key.double(), gate.double(), *wide, selection)
    for one, other in zip(found, expected, strict=True):
        assert_close(one.double(), other, kind)


@pytest.mark.parametrize("name", SHAPES)
def test_rows_and_their_gradients(name: str) -> None:
    (_, key, _, gate), selection = selected(name, 1)
    both(key, gate, selection)


def test_heads_that_share_a_selection_or_a_gate() -> None:
    (_, key, _, gate), selection = selected("three levels", 2)
    both(key, gate, selection)
    both(key, gate[:, :, :2], selection)


def test_packed_documents() -> None:
    """One goes in whole, and the others have a rest behind their last window."""
    (_, key, _, gate), selection = selected("three levels", 1, documents=True)
    both(key, gate, selection)


def test_bfloat16_and_gates_that_close() -> None:
    (_, key, _, gate), selection = selected("three levels", 1)
    both(key.bfloat16(), gate, selection, "bfloat16")
    gate[5:9, :, 1] = -torch.inf
    found = by_kernels(key, gate, selection)
    found += by_kernels_backward(key, gate, *map(torch.ones_like, found), selection)
    assert not any(x.isnan().any() for x in found)
    assert all(x.isfinite().all() for i, x in enumerate(found) if i != 1)


def test_strides_and_repeats_give_the_same_bits() -> None:
    (_, key, _, gate), selection = selected("three levels", 1)
    strided = [x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for x in (key, gate)]
    first, again = (by_kernels(*given, selection) for given in ((key, gate), strided))
    assert all(map(torch.equal, first, again))
    grads = (by_kernels_backward(*given, *first, selection) for given in ((key, gate), strided))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_profiles_count_them_as_gathering(way: str) -> None:
    assert kernel_mark(f"lighthouse_gather_{way}_decayed") == Mark("gather", way)
