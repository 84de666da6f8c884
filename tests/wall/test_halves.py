"""Halves of chunks: which rows meet, by counting pairs; and the kernels against the reference in float64, poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from megatron_lighthouse.kernels import wall as kernels
from megatron_lighthouse.softmax import blocks
from megatron_lighthouse.wall import decay as reference
from megatron_lighthouse.wall import layer
from megatron_lighthouse.wall.attention import wall_attention
from megatron_lighthouse.wall.cut import Step, halves, rows_of_halves
from megatron_lighthouse.wall.earlier import Stock
from megatron_lighthouse.wall.meets import meets
from megatron_lighthouse.wall.pieces import Sight
from tests.steps import DEVICE, poisoned
from tests.tolerances import assert_close
from tests.wall.oracle import formula, inputs, with_grads
from tests.wall.test_decay import MOST, close, rows_of


@pytest.mark.parametrize(("rows", "step"), [(1, 1), (7, 1), (18, 4), (32, 4), (33, 4), (5, 9)])
def test_any_two_pieces_meet_once(rows: int, step: int) -> None:
    seen = torch.zeros(rows, rows, dtype=torch.int64)
    for half, anchor, end in halves(rows, step):
        assert 0 < end - anchor <= half
        seen[anchor:end, anchor - half : anchor] += 1
    piece = torch.arange(rows) // step
    assert torch.equal(seen, (piece[:, None] > piece[None, :]).long())


@pytest.mark.parametrize(("rows", "step", "begin"), [(23, 3, 0), (16, 4, 16), (40, 5, 80)])
@pytest.mark.parametrize("window", [None, 1, 4, 11])
@pytest.mark.parametrize("bounds", [(), (0, 1, 2, 21, 22, 90, 97, 120)])
def test_rows_meet_those_that_they_see(rows: int, step: int, begin: int, window: int | None, bounds: tuple[int, ...]) -> None:
    """Each pair once, as views of rows that are numbered, and of halves that lie one after the other."""
    sight, places = Sight(bounds, window), torch.arange(rows).view(-1, 1, 1, 1)
    later, earlier = (torch.cat([places[part] for part in parts]) for parts in zip(*parts_of(rows, step), strict=True))
    seen = torch.zeros(rows, rows, dtype=torch.int64)
    for meet in meets(rows, step, sight, begin):
        near, far = (x[..., 0, 0].T for x in (meet.of_later(places), meet.of_earlier(places)))  # [times, rows]
        assert torch.equal(meet.of_near(later)[..., 0, 0].T, near)
        assert torch.equal(meet.of_far(earlier)[..., 0, 0].T, far)
        assert torch.equal(meet.of_lse(places.view(1, 1, -1)).squeeze(1), near)
        hidden = meet.hidden(window, places.device)
        for i, j in zip(near, far, strict=True):
            seen[i[:, None], j[None, :]] += 1 if hidden is None else (~hidden).long()
    token, piece = torch.arange(begin, begin + rows), torch.arange(rows) // step
    visible = token[None, :] >= sight.first(token)[:, None]
    assert torch.equal(seen, (visible & (piece[:, None] > piece[None, :])).long())


def parts_of(rows: int, step: int) -> list[tuple[slice, slice]]:
    return [(slice(anchor, end), slice(anchor - half, anchor)) for half, anchor, end in halves(rows, step)]


def test_without_documents_a_size_of_halves_is_one_call() -> None:
    found = meets(18432, 1024, Sight(), 0)
    assert [(meet.half, meet.times, meet.later) for meet in found] == [
        *((1024, 9, 1024), (2048, 4, 2048), (4096, 2, 4096), (8192, 1, 8192)),
        (16384, 1, 2048),
    ]
    assert rows_of_halves(18432, 1024) == (9216 + 3 * 8192 + 2048, 9216 + 3 * 8192 + 16384)


@pytest.mark.parametrize(
    ("rows", "heads", "of_gates", "of_keys", "dims", "step", "size"),
    [
        pytest.param(150, 2, 2, 2, (16, 16), 20, 0.01, id="pieces within a tile"),
        pytest.param(100, 4, 2, 2, (24, 8), 70, 3.0, id="shared gates, two tiles a piece, V is not K"),
        pytest.param(64, 4, 4, 2, (40, 16), 24, 0.3, id="shared keys, some channels at a time"),
        pytest.param(150, 4, 2, 1, (16, 16), 20, 0.3, id="shared gates and keys, three sizes, the last half shorter"),
        pytest.param(7, 4, 4, 1, (8, 16), 1, 0.3, id="rows alone"),
        pytest.param(5000, 1, 1, 1, (2, 2), 70, 0.03, marks=pytest.mark.slow, id="more tiles than are summed at a time"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16 if DEVICE == "cpu" else torch.bfloat16])
def test_the_kernels(
    rows: int, heads: int, of_gates: int, of_keys: int, dims: tuple[int, int], step: int, size: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    most = MOST[torch.float32 if dtype == torch.float32 else torch.bfloat16]
    query, key = rows_of(rows, heads, dims[0], dtype), rows_of(rows, of_keys, dims[0], dtype)
    gate = -size * rows_of(rows, of_gates, dims[0]).abs().float()
    wide, given = (query.double(), key.double(), gate.double()), (query.to(DEVICE), key.to(DEVICE), gate.to(DEVICE))
    sums = kernels.tile_sums(given[2], step)
    with poisoned():
        found = kernels.halves(*given, sums, step)
    expected = reference.halves(*wide, reference.tile_sums(gate, step), step)
    for one, other in zip(found, expected, strict=True):
        close(one, other, most)
    counts = rows_of_halves(rows, step)
    shapes = (counts[0], heads, dims[0]), (counts[1], of_gates, dims[0]), (counts[1], of_keys, dims[1])
    grads = [rows_of(*shape, dtype) for shape in shapes]
    totals = [
        rows_of(rows, n, dim, dtype).contiguous() for n, dim in ((heads, dims[0]), (of_keys, dims[0]), (of_keys, dims[1]))
    ]
    totals.append(rows_of(rows, of_gates, dims[0], torch.float32).contiguous())
    own, exact = [x.clone().to(DEVICE) for x in totals], [x.double() for x in totals]
    with poisoned():
        kernels.halves_backward(own, [x.to(DEVICE) for x in grads], *given, sums, step)
    reference.halves_backward(exact, [x.double() for x in grads], *wide, reference.tile_sums(gate, step), step)
    for one, other in zip(own, exact, strict=True):
        close(one, other, most)


def test_gates_of_minus_infinity() -> None:
    """A key that has faded is 0, and so is the gradient by way of it."""
    rows, gate = torch.ones(40, 1, 1, 4, device=DEVICE), torch.full((40, 1, 1, 4), -torch.inf, device=DEVICE)
    sums = kernels.tile_sums(gate, 16)
    near, far = kernels.halves(rows, rows, gate, sums, 16)
    assert near.isfinite().all()
    assert near.abs().max() < 1e-8
    assert far.view(-1, 16, 4)[:, :-1].abs().max() < 1e-8
    totals = [torch.zeros_like(rows) for _ in range(4)]
    kernels.halves_backward(totals, [torch.ones_like(x) for x in (near, far, far)], rows, rows, gate, sums, 16)
    assert all(x.isfinite().all() for x in totals)
    assert totals[0].abs().max() < 1e-8


@pytest.mark.parametrize("bounds", [None, (0, 9, 12, 43)])
def test_stock_attention_takes_halves_as_a_batch(bounds: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, by its stand-in: heads of a row and of a batch together, values of a group for each of its queries."""
    monkeypatch.setattr(Step, "TOKENS", 12)
    monkeypatch.setattr(layer, "earlier_for", lambda *given: Stock(blocks.Plain(given[3]), given[3]))
    batch = 1 if bounds else 2
    for tied in (False, True):
        tensors = inputs(43, batch, 4, 2, (6, 6), gate=-0.1, tied=tied, sink=True)
        how = {"cu_seqlens": torch.tensor(bounds)} if bounds else {}
        expected = with_grads(formula, tensors, **how)
        for found, one in zip(with_grads(wall_attention, tensors, **how), expected, strict=True):
            assert_close(found, one, "ranks float64")
