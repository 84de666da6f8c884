"""Lighthouse's rows for Wall in plain PyTorch: any device and dtype, deterministic. What defines them; see `gathered`."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.packed.maps import Maps
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.reference import read, read_or_zero
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.wall.decay import spread, suffix, suffix_backward


def gather(key: Tensor, gate: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Of keys [n, B, G, K] and gates [n, B, heads, K] in the dtype of sums: [S, B, heads, K] of either, in its dtype."""
    pyramid, selections, entries = selection.geometry, selection.places.shape[1], selection.indices
    (_, *coarse), _ = _pyramid(key, gate, selection, pyramid.levels)
    rows = gate.new_zeros(selection.length, *gate.shape[1:])
    for level, x in enumerate([key, *coarse]):
        entry = entries - pyramid.offset(level)
        there = (entry >= 0) & (entry < pyramid.entries(level))
        found = read_or_zero(x.unflatten(2, (selections, -1)), entry.where(there, -1)).flatten(2, 3)
        rows += spread(found, gate.shape[2]) / pyramid.window(level)
    return rows.to(key.dtype), sums(gate, *runs_of_tokens(selection))


def gather_backward(key: Tensor, gate: Tensor, grad: Tensor, grad_gates: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Of the keys, [n, B, heads, K], and of the gates, in the dtype of sums."""
    pyramid, rows = selection.geometry, grad.unflatten(2, (selection.places.shape[1], -1))
    keys, gates = _pyramid(key, gate, selection, pyramid.levels - 1)
    own = [read_or_zero(rows, places).flatten(2, 3) / pyramid.window(i) for i, places in enumerate(selection.rows)]
    dk, dg = own[-1], torch.zeros_like(own[-1])
    for level in range(pyramid.levels - 1, 0, -1):
        dk, dg = _fold_backward(keys[level - 1], gates[level - 1], dk, dg, pyramid.pooling)
        dk = dk + own[level - 1] if level > 1 else dk
    row, _ = runs_of_tokens(selection)
    d_keys, d_gates = own[0], sums_backward(grad_gates, row)
    inside = _inside(selection)
    d_keys[inside] += dk
    d_gates[inside] += dg
    return d_keys, d_gates


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


def sums(gate: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """Of gates [n, B, heads, ·] those of the tokens of each row, [S, B, heads, ·]; each sum has one order."""
    grouped = gate.unflatten(2, (row.shape[1], -1)).permute(1, 2, 0, 3, 4)
    found = torch.segment_reduce(grouped.reshape(row.numel(), -1), "sum", lengths=lengths.flatten(), initial=0, unsafe=True)
    return found.view(*lengths.shape, *grouped.shape[3:]).permute(2, 0, 1, 3, 4).flatten(2, 3)


def sums_backward(grad: Tensor, row: Tensor) -> Tensor:
    return read(grad.unflatten(2, (row.shape[1], -1)), row).flatten(2, 3)


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


def _pyramid(key: Tensor, gate: Tensor, selection: Selection, levels: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of decayed keys and of gates, level by level, of the tokens that form windows: the finest are these themselves."""
    inside = _inside(selection)
    keys, gates = [key[inside]], [gate[inside]]
    for _ in range(1, levels):
        x, total = _fold(keys[-1], gates[-1], selection.geometry.pooling)
        keys.append(x)
        gates.append(total)
    return keys, gates


def _inside(selection: Selection) -> slice | Tensor:
    """The tokens that form windows."""
    return Maps.of(selection.geometry).inside if isinstance(selection.geometry, Packing) else slice(None)


def _fold(x: Tensor, gate: Tensor, pooling: int) -> tuple[Tensor, Tensor]:
    """Sums of keys and gates of windows, of those x and G of their parts: Σ_c x_c exp(Σ_{c<c'} G_c') and Σ_c G_c."""
    parts, wide = _parts(x, gate, pooling)
    return (wide * suffix(parts, 1).exp()).sum(1), parts.sum(1)


def _fold_backward(x: Tensor, gate: Tensor, d_sums: Tensor, d_totals: Tensor, pooling: int) -> tuple[Tensor, Tensor]:
    """Of x, for each head of the gates, and of these."""
    parts, wide = _parts(x, gate, pooling)
    dx = d_sums.unsqueeze(1) * suffix(parts, 1).exp()
    d_gate = d_totals.unsqueeze(1) + suffix_backward(wide * dx, 1)
    return dx.flatten(0, 1), d_gate.flatten(0, 1)


def _parts(x: Tensor, gate: Tensor, pooling: int) -> tuple[Tensor, Tensor]:
    """[n, p, B, heads, K] of gates, and of keys."""
    wide = spread(x.to(gate.dtype), gate.shape[2])
    return gate.unflatten(0, (-1, pooling)), wide.unflatten(0, (-1, pooling))
