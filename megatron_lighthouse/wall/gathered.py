"""What Lighthouse gathers for Wall: keys that have decayed to the end of their window, and the gates of rows.

Rows stand in the order of their last token. The gate of a row is the sum of those of the tokens after the last one of the row
before, up to its own last: 0 between a window and the one that it ends with. So between two rows lie the gates of all tokens
between their last ones, none positive, and any Wall attends to rows. A window's key is

    k̃ = mean_j k_j exp(Σ_{j<t<=last} g_t)

so that its logit is the mean of those that its tokens have for a later token's query. Queries and values are averaged as ever.
Ours; with gates of 0 it is Lighthouse without positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.lighthouse.packed.maps import Maps
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.reference import accumulation_dtype, read, read_or_zero
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.wall.decay import spread
from megatron_lighthouse.wall.fold import fold, fold_backward


def gather(
    take: Callable[..., tuple[Tensor, ...]], selection: Selection, query: Tensor, key: Tensor, value: Tensor, *gates: Tensor
) -> tuple[Tensor, ...]:
    """Rows of queries [S, B, H, K], decayed keys [S, B, heads of the gates, K], values, and gates in the dtype of sums.

    Args:
        take: `Steps.gather`, of this selection.
        gates: [n, B, H or G, K]; and scalar gates [n, B, H, 1] where there are.
    """
    rows_q, _, rows_v = take(query, key.detach(), value)
    with profiled("gather gates"):
        wide = [x.to(accumulation_dtype(query)) for x in gates]
        rows_k: Tensor = _Keys.apply(key, wide[0], selection)
        runs = runs_of_tokens(selection)
        return rows_q, rows_k, rows_v, *(_Gates.apply(x, *runs) for x in wide)


def runs_of_tokens(selection: Selection) -> tuple[Tensor, Tensor]:
    """[B, selections, n] int64, the first row that ends with a token or after it, whose gate has the token's; and how many
    tokens each row has so, [B, selections, S].

    A chunk, and a document, ends with a row: so no row has gates of two.
    """
    places, pyramid = selection.places.long(), selection.geometry
    shape, tokens = places.shape[:2], torch.arange(pyramid.seq_length, device=places.device)
    ends = places.new_full((*shape, selection.length + 1), pyramid.seq_length - 1)
    # entries that are not gathered are written behind the end, which is cut off
    at = places.where(places >= 0, selection.length)
    ends = ends.scatter_(-1, at, _last_tokens(selection).expand_as(places))[..., :-1].contiguous()
    lengths = ends.diff(prepend=ends.new_full((*shape, 1), -1))
    return torch.searchsorted(ends, tokens.expand(*shape, -1).contiguous()), lengths


def _last_tokens(selection: Selection) -> Tensor:
    """[entries] int64, of the concatenated pyramid: the last token of each."""
    pyramid, device = selection.geometry, selection.places.device
    levels = []
    for level in range(pyramid.levels):
        if level and isinstance(pyramid, Packing):
            levels.append(Maps.of(pyramid).inside.view(-1, pyramid.window(level))[:, -1])
        else:
            levels.append((torch.arange(pyramid.entries(level), device=device) + 1) * pyramid.window(level) - 1)
    return torch.cat(levels)


class _Gates(torch.autograd.Function):
    """(gates [n, B, heads, ·], the row of each token, and the tokens of each row) -> [S, B, heads, ·], the sums of rows."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        grouped = gate.unflatten(2, (row.shape[1], -1)).permute(1, 2, 0, 3, 4)
        sums = torch.segment_reduce(grouped.reshape(row.numel(), -1), "sum", lengths=lengths.flatten(), initial=0, unsafe=True)
        return sums.view(*lengths.shape, *grouped.shape[3:]).permute(2, 0, 1, 3, 4).flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (row,) = ctx.saved_tensors
        return read(grad.unflatten(2, (row.shape[1], -1)), row).flatten(2, 3), None, None


class _Keys(torch.autograd.Function):
    """(key [n, B, G, K], gate [n, B, heads, K], selection) -> [S, B, heads, K] in the key's dtype. Keeps both."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, gate: Tensor, selection: Selection) -> Tensor:
        ctx.save_for_backward(key, gate)
        ctx.selection = selection
        pyramid, selections = selection.geometry, selection.places.shape[1]
        (_, *coarse), _ = _pyramid(key, gate, selection, pyramid.levels)
        rows = None
        for level, x in enumerate([key, *coarse]):
            entry = selection.indices - pyramid.offset(level)
            there = (entry >= 0) & (entry < pyramid.entries(level))
            found = read_or_zero(x.unflatten(2, (selections, -1)), entry.where(there, -1)).flatten(2, 3)
            found = spread(found, gate.shape[2]) / pyramid.window(level)
            rows = found if rows is None else rows + found
        assert rows is not None
        return rows.to(key.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (key, gate), selection = ctx.saved_tensors, ctx.selection
        pyramid, rows = selection.geometry, grad.unflatten(2, (selection.places.shape[1], -1))
        keys, gates = _pyramid(key, gate, selection, pyramid.levels - 1)
        own = (read_or_zero(rows, places).flatten(2, 3) / pyramid.window(i) for i, places in enumerate(selection.rows))
        tokens, *coarse = own
        d_sums, d_totals = coarse[-1], torch.zeros_like(coarse[-1])
        for level in range(pyramid.levels - 1, 0, -1):
            d_sums, d_totals = fold_backward(keys[level - 1], gates[level - 1], d_sums, d_totals, pyramid.pooling)
            if level > 1:
                d_sums = d_sums + coarse[level - 2]
        inside = _inside(selection)
        if inside is None:
            tokens, d_gate = tokens + d_sums, d_totals
        else:
            tokens[inside] += d_sums
            d_gate = torch.zeros_like(gate)
            d_gate[inside] = d_totals
        return tokens.unflatten(2, (key.shape[2], -1)).sum(3).to(key.dtype), d_gate, None


def _pyramid(key: Tensor, gate: Tensor, selection: Selection, levels: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of decayed keys and of gates, level by level, of the tokens that form windows: the finest are these themselves."""
    inside = _inside(selection)
    keys, gates = [key if inside is None else key[inside]], [gate if inside is None else gate[inside]]
    for _ in range(1, levels):
        sums, totals = fold(keys[-1], gates[-1], selection.geometry.pooling)
        keys.append(sums)
        gates.append(totals)
    return keys, gates


def _inside(selection: Selection) -> Tensor | None:
    """The tokens that form windows, where not all do."""
    return Maps.of(selection.geometry).inside if isinstance(selection.geometry, Packing) else None
