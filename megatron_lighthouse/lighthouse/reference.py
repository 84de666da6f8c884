"""The steps of Lighthouse Attention in plain PyTorch: any device, any floating dtype, deterministic.

What the kernels are held to, and the path on CPU. Tensors x are [N, B, G, ...] with the heads of a group in the
trailing dimensions; sums are in fp32, or in fp64 for fp64 inputs. Sources: arXiv 2605.06554 unless marked "ours".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_lighthouse.lighthouse.causal import earlier_as_high, select_causally
from megatron_lighthouse.lighthouse.geometry import Geometry, Pyramid
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.steps import FarTravel, HaloTravel
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.base import scaled
from megatron_lighthouse.sums import accumulation_dtype, by_neighbours, one_by_one


def pool(x: Tensor, geometry: Pyramid, rotary: Rotary | None = None) -> list[Tensor]:
    """The pyramid of `x`: per level l the [N/p^l, B, G, ...] means of its windows, in x's dtype.

    With `rotary`, of rows that are turned on to the last token of their window.
    """
    pyramid, mean = [x], x.to(accumulation_dtype(x))
    for level in range(1, geometry.levels):
        parts = mean.unflatten(0, (-1, geometry.pooling))
        mean = (parts if rotary is None else rotary.turn(parts, tokens_behind(geometry, level))).mean(1)
        pyramid.append(mean.to(x.dtype))
    return pyramid


def tokens_behind(geometry: Pyramid, level: int) -> Tensor:
    """[p]: the tokens between the end of each part (of level - 1) of a window of `level` and the window's end."""
    return torch.arange(geometry.pooling - 1, -1, -1) * geometry.window(level - 1)


@torch.no_grad()
@profiled("score")
def score(query: Tensor, key: Tensor, geometry: Pyramid) -> Tensor:
    """See `Steps.score`. The sums are made in a fixed order, so that every device ranks alike to the last bit."""
    scores = []
    for x in (query.unflatten(2, (key.shape[2], -1)), key.unsqueeze(3)):
        squares = one_by_one(by_neighbours(x.to(accumulation_dtype(x)).square(), -1), 3)
        scores.append(window_maxima(_sqrt(squares).permute(1, 2, 0), geometry))
    return torch.stack(scores)


def window_maxima(level: Tensor, geometry: Pyramid) -> Tensor:
    """The maxima of level-0 scores [..., N] over the windows of levels 1..L-1: [..., coarse length] (paper)."""
    coarse = []
    for _ in range(1, geometry.levels):
        level = level.unflatten(-1, (-1, geometry.pooling)).amax(-1)
        coarse.append(level)
    return torch.cat(coarse, -1)


QUERIES = 64
"""Rows that `attended_norms` works on at a time."""


@torch.no_grad()
@profiled("attended_norms")
def attended_norms(query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, scale: float | None = None) -> Tensor:
    """See `Steps.attended_norms`."""
    begins = chunk_starts(query.shape[0], layout)
    return norms_of_chunks(query.chunk(len(begins)), begins, key, value, scale)


def norms_of_chunks(
    chunks: Sequence[Tensor], begins: Sequence[int], key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """`attended_norms` of queries that are runs of the sequence, each of which begins at its position.

    Every product has a shape that the position in the sequence settles, and so one order.
    """
    groups, heads, query = key.shape[2], chunks[0].shape[2], chunks[0]
    kind, squares = accumulation_dtype(query), []
    keys, values = (x.permute(1, 2, 0, 3) for x in (key, value))
    for first, block, own in blocks_of(chunks, begins, QUERIES):
        position = first + torch.arange(QUERIES, device=query.device)
        k, v = (x[:, :, : first + QUERIES].to(kind) for x in (keys, values))
        q = block.to(kind).unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4).flatten(2, 3)
        logits = scaled(q @ k.mT, query, scale).unflatten(2, (-1, QUERIES))
        hidden = torch.arange(k.shape[2], device=query.device) > position.unsqueeze(-1)
        weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1).flatten(2, 3)
        squares.append((weights @ v).square().sum(-1).unflatten(2, (heads // groups, QUERIES))[..., own])
    return group_norms(torch.cat(squares, -1))


def blocks_of(chunks: Sequence[Tensor], begins: Sequence[int], size: int) -> Iterator[tuple[int, Tensor, slice]]:
    """Blocks of `size` rows that begin at its multiples, so that a position settles what shape its products have.

    Yields the position of a block's first row; its rows, zero where they are not the chunk's; and which rows are the chunk's.
    """
    for begin, chunk in zip(begins, chunks, strict=True):
        before = begin % size
        rows = torch.nn.functional.pad(chunk, (0, 0) * 3 + (before, -(before + chunk.shape[0]) % size))
        for i, block in enumerate(rows.split(size)):
            skipped = before - i * size
            yield begin - skipped, block, slice(max(0, skipped), skipped + chunk.shape[0])


def chunk_starts(rows: int, layout: Layout | None) -> list[int]:
    """The positions in the sequence at which the chunks begin that `rows` tokens of a rank are made of."""
    return [0] if layout is None else [chunk * (rows // 2) for chunk in layout.chunks]


def group_norms(squares: Tensor) -> Tensor:
    """The norms [B, G, n] of a group's rows taken as one vector, from their squared norms [B, G, R, n]; in a fixed order."""
    return _sqrt(one_by_one(squares, 2))


def _sqrt(x: Tensor) -> Tensor:
    # by way of fp64 because torch's sqrt in fp32 is not correctly rounded on every CPU
    return x.double().sqrt().to(x.dtype)


@torch.no_grad()
@profiled("select")
def select(scores: Tensor, geometry: Geometry, pin_first: bool, causal: bool = False) -> Selection:
    """See `Steps.select`."""
    if causal:
        return select_causally(scores, geometry, places_of, earlier_as_high)
    half, top = geometry.tile_budget // 2, geometry.levels - 1
    by_level = scores.split(geometry.level_lengths[1:], -1)
    batch, groups, device = *scores.shape[1:3], scores.device
    everything = torch.arange(geometry.entries(top), device=device)
    candidates = everything.reshape(geometry.tiles, -1).expand(batch, groups, -1, -1)
    gathered = [torch.empty(0)] * geometry.levels
    for level in range(top, -1, -1):
        mask = torch.zeros(batch, groups, geometry.entries(level), dtype=torch.bool, device=device)
        gathered[level] = mask.scatter_(-1, candidates.flatten(2), True)
        if level == 0:
            break
        by_query, by_key = (_take(x, candidates) for x in by_level[level - 1])
        if pin_first:
            by_query[:, :, 0, 0] = torch.inf
        first = _highest(by_query, half)
        second = _highest(by_key.scatter(-1, first, -torch.inf), half)
        refined = candidates.gather(-1, torch.cat([first, second], -1)).sort(-1).values
        children = refined.unsqueeze(-1) * geometry.pooling + torch.arange(geometry.pooling, device=device)
        candidates = children.flatten(-2)
    return Selection(geometry, places_of(gathered, geometry), geometry.gathered_length)


def _take(scores: Tensor, candidates: Tensor) -> Tensor:
    return scores.gather(-1, candidates.flatten(2)).reshape(candidates.shape)


def _highest(scores: Tensor, count: int) -> Tensor:
    # topk leaves the order of ties open; a stable sort gives them to the lower index
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def places_of(gathered: list[Tensor], geometry: Pyramid) -> Tensor:
    """An entry's place is the number of gathered entries before it: a prefix sum per level, and no sort."""
    device = gathered[0].device
    before = [torch.nn.functional.pad(mask.cumsum(-1), (1, 0)) for mask in gathered]
    places = []
    for level, mask in enumerate(gathered):
        ends = (torch.arange(geometry.entries(level), device=device) + 1) * geometry.window(level)
        place = torch.zeros_like(before[level][..., 1:])
        for other in range(geometry.levels):
            place += before[other][..., geometry.entries_ending_before(level, ends, other)]
        places.append(torch.where(mask, place, -1))
    return torch.cat(places, -1).int()


@profiled("gather")
def gather(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    travel: FarTravel | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Steps.gather`."""
    grouped = [x.unflatten(2, (n := selection.places.shape[1], x.shape[2] // n)) for x in (query, key, value)]
    rows_k, rows_v = (
        _Gather.apply(x, selection, how).flatten(2, 3) for x, how in zip(grouped[1:], (rotary, None), strict=True)
    )
    if travel is not None:
        rows_k, rows_v = _Travel.apply(rows_k, rows_v, travel)
    return _Gather.apply(grouped[0], selection, rotary).flatten(2, 3), rows_k, rows_v


@profiled("scatter")
def scatter(rows: Tensor, selection: Selection, halo: Tensor | None = None, travel: HaloTravel | None = None) -> Tensor:
    """See `Steps.scatter`."""
    if travel is not None:
        travel.arrive()
    groups = selection.places.shape[1]
    grouped = rows.unflatten(2, (groups, -1))
    return _Scatter.apply(grouped, None if halo is None else halo.unflatten(3, (groups, -1)), selection).flatten(2, 3)


class _Gather(torch.autograd.Function):
    """dX_j = sum over levels of dX̃[row(l, j // p^l)] / p^l, turned back by as much as X_j was turned on."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, selection: Selection, rotary: Rotary | None) -> Tensor:
        ctx.selection, ctx.rotary = selection, rotary  # type: ignore[attr-defined]
        return read(torch.cat(pool(x, selection.geometry, rotary)), selection.indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        selection: Selection = ctx.selection  # type: ignore[attr-defined]
        rotary: Rotary | None = ctx.rotary  # type: ignore[attr-defined]
        geometry = selection.geometry
        total: Tensor | None = None
        for level in range(geometry.levels - 1, -1, -1):
            part = read_or_zero(grad, selection.rows[level]) / geometry.window(level)
            if total is None:
                total = part
                continue
            parts = total.unsqueeze(1).expand(-1, geometry.pooling, *total.shape[1:])
            turned = parts if rotary is None else rotary.turn(parts, -tokens_behind(geometry, level + 1))
            total = part.add_(turned.flatten(0, 1))
        assert total is not None
        return total.to(grad.dtype), None, None


class _Travel(torch.autograd.Function):
    """(rows of keys, of values, travel) -> the same, which set out, and whose gradients come home."""

    @staticmethod
    def forward(ctx: FunctionCtx, key: Tensor, value: Tensor, travel: FarTravel) -> tuple[Tensor, Tensor]:
        ctx.travel = travel  # type: ignore[attr-defined]
        travel.set_out((key, value))
        return key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.travel.come_home((grad_key, grad_value)), None  # type: ignore[attr-defined]


class _Scatter(torch.autograd.Function):
    """dÕ_m = sum of dO over the spill range of entry m. Works on chunks: [n, ...] -> [chunks, n / chunks, ...]."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, halo: Tensor | None, selection: Selection) -> Tensor:
        ctx.selection, ctx.has_halo = selection, halo is not None  # type: ignore[attr-defined]
        geometry, chunks = selection.geometry, selection.chunks
        spilling = selection.by_level(selection.scattered)
        out = read_or_zero(rows, spilling[0]).unflatten(0, (chunks, -1))
        for level in range(1, geometry.levels):
            window, start = geometry.window(level), geometry.spill(level).start
            entries = read_or_zero(rows, spilling[level]).unflatten(0, (chunks, -1))
            out[:, start:] += entries.repeat_interleave(window, 1)[:, : out.shape[1] - start]
            if halo is not None:
                out[:, :start] += halo[:, level - 1, None].to(out.dtype)
        return out.flatten(0, 1).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        selection: Selection = ctx.selection  # type: ignore[attr-defined]
        geometry = selection.geometry
        wide = grad.to(accumulation_dtype(grad)).unflatten(0, (selection.chunks, -1))
        sums, halo = [wide.flatten(0, 1)], []
        for level in range(1, geometry.levels):
            start = geometry.spill(level).start
            shifted = torch.cat([wide[:, start:], wide.new_zeros(wide.shape[0], start, *wide.shape[2:])], 1)
            sums.append(shifted.flatten(0, 1).unflatten(0, (-1, geometry.window(level))).sum(1))
            halo.append(wide[:, :start].sum(1))
        of_entries = torch.cat(sums)
        if selection.spills is not None:
            of_entries[(selection.spills < 0).movedim(-1, 0)] = 0
        rows = read(of_entries, selection.indices).to(grad.dtype)
        return rows, torch.stack(halo, 1).to(grad.dtype) if ctx.has_halo else None, None  # type: ignore[attr-defined]


def read(source: Tensor, places: Tensor) -> Tensor:
    """source [n, B, G, ...] at places [B, G, m] -> [m, B, G, ...]."""
    batch, groups, _ = places.shape
    b = torch.arange(batch, device=places.device).view(-1, 1)
    g = torch.arange(groups, device=places.device)
    return source[places.permute(2, 0, 1), b, g]


def read_or_zero(source: Tensor, places: Tensor) -> Tensor:
    """As `read`, in the dtype of sums, with zero rows where a place is -1."""
    found = read(source, places.clamp(min=0)).to(accumulation_dtype(source))
    missing = (places < 0).permute(2, 0, 1).view(*found.shape[:3], *[1] * (found.dim() - 3))
    return found.masked_fill_(missing, 0)
