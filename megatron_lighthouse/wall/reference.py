"""The diagonal in plain PyTorch, by doubling: right for any gate and length, any device and dtype. See `diagonal.Diagonal`.

A row and its own key need no gate. Then for s = 1, 2, 4, …: of every 2s rows the later s attend to the earlier s, with
the anchor between them: so each pair has an anchor between its rows, and all sums of gates go outward from it. Ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_lighthouse.softmax.blocks import tokens_first
from megatron_lighthouse.sums import accumulation_dtype, next_power_of_two
from megatron_lighthouse.wall.decay import prefix, prefix_backward, suffix, suffix_backward
from megatron_lighthouse.wall.diagonal import Grads
from megatron_lighthouse.wall.pairs import attend, change_of, logits_of


class Size:
    """What bounds memory."""

    ELEMENTS: ClassVar = 1 << 25
    """Logits that are held at a time, in several copies."""


def forward(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scalar_gate: Tensor | None, scale: float, first: Tensor
) -> tuple[Tensor, Tensor]:
    rows, heads = query.shape[0], query.shape[2]
    q, k, v, g = _wide(heads, query, key, value, gate)
    of_scalar = _scalar(scalar_gate)
    lse, out = (q * k).sum(-1) * scale, v.clone()
    for halves in _halves(_first(first, q), q):
        decayed = _Decayed(halves, q, k, g, of_scalar, scale)
        found, found_lse = attend(decayed.logits, halves.left(v))
        own = halves.right(lse)
        total = torch.logaddexp(own, found_lse)
        first_share, share = ((x - total).exp().unsqueeze(-1) for x in (own, found_lse))
        halves.put_right(out, halves.right(out) * first_share + found * share)
        halves.put_right(lse, total)
    return tokens_first(out[:, :, :rows]).to(query.dtype), lse[..., :rows]


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    scalar_gate: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    first: Tensor,
) -> Grads:
    rows, heads = query.shape[0], query.shape[2]
    q, k, v, g, grad, out = _wide(heads, query, key, value, gate, grad, out)
    of_scalar = _scalar(scalar_gate)
    delta = (grad * out).sum(-1)
    lse = pad(lse, (0, q.shape[2] - rows))
    weights = ((q * k).sum(-1) * scale - lse).exp()
    change = (weights * ((grad * v).sum(-1) - delta)).unsqueeze(-1) * scale
    dq, dk, dv = change * k, change * q, weights.unsqueeze(-1) * grad
    dg, d_scalar = torch.zeros_like(g), None if of_scalar is None else torch.zeros_like(of_scalar)
    for halves in _halves(_first(first, q), q):
        decayed, g_right = _Decayed(halves, q, k, g, of_scalar, scale), halves.right(grad)
        weights, change = change_of(decayed.logits, halves.right(lse), g_right, halves.right(delta), halves.left(v))
        halves.add_left(dv, weights.transpose(-1, -2) @ g_right)
        if d_scalar is not None:
            halves.add_right(d_scalar, prefix_backward(change.sum(-1), -1))
            halves.add_left(d_scalar, suffix_backward(change.sum(-2), -1))
        change *= scale
        of_query, of_key = change @ decayed.key, change.transpose(-1, -2) @ decayed.query
        halves.add_right(dq, of_query * decayed.of_query)
        halves.add_left(dk, of_key * decayed.of_key)
        halves.add_right(dg, prefix_backward(of_query * decayed.query, -2))
        halves.add_left(dg, suffix_backward(of_key * decayed.key, -2))
    dk, dv = (x.unflatten(1, (key.shape[2], -1)).sum(2) for x in (dk, dv))
    d_q, d_k, d_v = (tokens_first(x[:, :, :rows]).to(query.dtype) for x in (dq, dk, dv))
    d_gate = tokens_first(dg[:, :, :rows])
    return d_q, d_k, d_v, d_gate, None if d_scalar is None else d_scalar[..., :rows].permute(2, 0, 1)


@dataclass(frozen=True)
class _Halves:
    """Some of the stretches of 2s rows, the later half of which sees the earlier: views of [B, H, n, ...]."""

    stretches: Tensor
    half: int
    hidden: Tensor
    """[stretches, s, s]."""

    def left(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, 2, self.half))[:, :, self.stretches, 0]

    def right(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, 2, self.half))[:, :, self.stretches, 1]

    def put_right(self, x: Tensor, rows: Tensor) -> None:
        x.unflatten(2, (-1, 2, self.half))[:, :, self.stretches, 1] = rows

    def add_left(self, x: Tensor, rows: Tensor) -> None:
        x.unflatten(2, (-1, 2, self.half))[:, :, self.stretches, 0] += rows

    def add_right(self, x: Tensor, rows: Tensor) -> None:
        x.unflatten(2, (-1, 2, self.half))[:, :, self.stretches, 1] += rows


class _Decayed:
    """Queries and keys of two halves, decayed to the anchor between them, and their logits."""

    def __init__(self, halves: _Halves, q: Tensor, k: Tensor, g: Tensor, scalar: Tensor | None, scale: float) -> None:
        self.of_query, self.of_key = prefix(halves.right(g), -2).exp(), suffix(halves.left(g), -2).exp()
        self.query, self.key = halves.right(q) * self.of_query, halves.left(k) * self.of_key
        bias = None if scalar is None else (prefix(halves.right(scalar), -1), suffix(halves.left(scalar), -1))
        self.logits = logits_of(self.query, self.key, scale, bias, halves.hidden)


def _halves(first: Tensor, q: Tensor) -> Iterator[_Halves]:
    """Those in which anything is seen, smallest first, as many at a time as memory is meant for."""
    rows, half = len(first), 1
    places = torch.arange(rows, device=first.device)
    while half < rows:
        starts = places[half :: 2 * half]
        seen = (first[starts] < starts).nonzero().squeeze(1)
        most = max(1, Size.ELEMENTS // (q.shape[0] * q.shape[1] * half * half))
        for stretches in seen.split(most) if len(seen) else ():
            left, right = (x.unflatten(0, (-1, 2, half))[stretches, side] for side, x in ((0, places), (1, first)))
            yield _Halves(stretches, half, left.unsqueeze(1) < right.unsqueeze(2))
        half *= 2


def _first(first: Tensor, q: Tensor) -> Tensor:
    """Of rows that fill up too, which see none but themselves."""
    return torch.cat([first, torch.arange(len(first), q.shape[2], device=first.device, dtype=first.dtype)])


def _wide(heads: int, *tensors: Tensor) -> list[Tensor]:
    """[B, H, n, ·] in the dtype of sums, a key/value head repeated for each of its queries, filled up to 2^x rows by zeros."""
    dtype, rows = accumulation_dtype(tensors[0]), tensors[0].shape[0]
    more = next_power_of_two(rows) - rows
    spread = (x.permute(1, 2, 0, 3).to(dtype).repeat_interleave(heads // x.shape[2], 1) for x in tensors)
    return [pad(x, (0, 0, 0, more)) for x in spread]


def _scalar(gate: Tensor | None) -> Tensor | None:
    """[B, H, n], filled up likewise."""
    if gate is None:
        return None
    return pad(gate.permute(1, 2, 0), (0, next_power_of_two(len(gate)) - len(gate)))
