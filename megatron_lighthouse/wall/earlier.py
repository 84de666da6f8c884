"""Earlier: queries that are decayed from an anchor, over keys before it that are decayed to it: plain softmax attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Block, Mask, Part, Tensors
from megatron_lighthouse.softmax.blocks import for_each_head, tokens_first
from megatron_lighthouse.wall import biased
from megatron_lighthouse.wall.decay import spread, summed
from megatron_lighthouse.wall.pairs import attend, change_of, logits_of

UNMASKED = Mask((1,), (0,))


@dataclass(frozen=True)
class Rows:
    """What meets at an anchor."""

    query: Tensor
    """[n, B, H, K]."""
    key: Tensor
    """[m, B, H or G, K]."""
    value: Tensor
    """[m, B, G, V]."""
    bias: tuple[Tensor, Tensor] | None = None
    """[n, B, H, 1] and [m, B, H, 1], the scalar gates from the anchor and to it, in the dtype of sums."""
    hidden: Tensor | None = None
    """[n, m], whom a row does not see; None: it sees all."""


Grads = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]
"""Of the query, key, value and bias of `Rows`."""


@dataclass(frozen=True)
class Stock:
    """By a softmax block, without a mask.

    With a `width` all rows are filled up by zeros to as many channels, and scalar gates are some of these: see `biased`.
    """

    block: Block
    scale: float
    width: int | None = None
    """Of the block's rows; None: K = V, and there are no scalar gates."""

    def forward(self, rows: Rows) -> Part:
        found = self.block.forward(*self._given(rows), UNMASKED)
        lse = found.lse if rows.bias is None else found.lse + biased.of_rows(rows.bias[0])
        return Part((found.averages[0][..., : rows.value.shape[-1]],), lse)

    def backward(self, grad: Tensor, rows: Rows, part: Part) -> Grads:
        dim, value_dim = rows.query.shape[-1], rows.value.shape[-1]
        lse = part.lse if rows.bias is None else part.lse - biased.of_rows(rows.bias[0])
        wide = Part((self._wide(part.averages[0]),), lse)
        (dq,), (dk, dv) = self.block.backward(self._wide(grad), *self._given(rows), wide, UNMASKED)
        bias = None if rows.bias is None else biased.gradients(dq[..., dim:], dk[..., dim:], self.scale, lse.dtype)
        of_key, of_value = summed(dk[..., :dim], rows.key.shape[2]), summed(dv[..., :value_dim], rows.value.shape[2])
        return dq[..., :dim], of_key, of_value, bias

    def _given(self, rows: Rows) -> tuple[Tensors, Tensors]:
        """Near and far rows of the block."""
        heads = rows.key.shape[2] if rows.bias is None else rows.query.shape[2]
        query, key, value = rows.query, spread(rows.key, heads), spread(rows.value, heads)
        more = (None, None) if rows.bias is None else biased.columns(rows.bias[1], self.scale, query.dtype)
        return (self._wide(query, more[0]),), (self._wide(key, more[1]), self._wide(value))

    def _wide(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """[..., width]: x, then `columns`, then zeros."""
        if self.width is None:
            return x
        out, dim = x.new_zeros(*x.shape[:-1], self.width), x.shape[-1]
        out[..., :dim] = x
        if columns is not None:
            out[..., dim : dim + biased.COLUMNS] = columns
        return out


@dataclass(frozen=True)
class Plain:
    """The formula in plain PyTorch, some queries at a time: any device, dtype and mask."""

    scale: float
    ELEMENTS: ClassVar = 1 << 25
    """Logits that are held at a time, in several copies."""

    def forward(self, rows: Rows) -> Part:
        q, k, v = for_each_head(rows.query, rows.key, rows.value)
        found = [attend(self._logits(q[:, :, some], k, own), v) for some, own in self._parts(rows)]
        out, lse = torch.cat([x for x, _ in found], 2), torch.cat([x for _, x in found], 2)
        return Part((tokens_first(out).to(rows.query.dtype),), lse)

    def backward(self, grad: Tensor, rows: Rows, part: Part) -> Grads:
        q, k, v, g, o = for_each_head(rows.query, rows.key, rows.value, grad, *part.averages)
        delta = (g * o).sum(-1)
        dq, of_query, dk, dv, of_key = [], [], torch.zeros_like(k), torch.zeros_like(v), k.new_zeros(k.shape[:3])
        for some, own in self._parts(rows):
            logits = self._logits(q[:, :, some], k, own)
            weights, change = change_of(logits, part.lse[:, :, some], g[:, :, some], delta[:, :, some], v)
            dv += weights.transpose(-1, -2) @ g[:, :, some]
            of_query.append(change.sum(-1))
            of_key += change.sum(-2)
            change *= self.scale
            dq.append(change @ k)
            dk += change.transpose(-1, -2) @ q[:, :, some]
        dk, dv = (x.unflatten(1, (like.shape[2], -1)).sum(2) for x, like in ((dk, rows.key), (dv, rows.value)))
        d_q, d_k, d_v = (tokens_first(x).to(grad.dtype) for x in (torch.cat(dq, 2), dk, dv))
        of_near, of_far = (tokens_first(x.unsqueeze(-1)) for x in (torch.cat(of_query, 2), of_key))
        return d_q, d_k, d_v, None if rows.bias is None else (of_near, of_far)

    def _parts(self, rows: Rows) -> Iterator[tuple[slice, Rows]]:
        count = max(1, self.ELEMENTS // (rows.query.shape[1] * rows.query.shape[2] * len(rows.key)))
        for i in range(0, len(rows.query), count):
            some = slice(i, i + count)
            bias = None if rows.bias is None else (rows.bias[0][some], rows.bias[1])
            hidden = None if rows.hidden is None else rows.hidden[some]
            yield some, replace(rows, query=rows.query[some], bias=bias, hidden=hidden)

    def _logits(self, q: Tensor, k: Tensor, rows: Rows) -> Tensor:
        if rows.bias is None:
            return logits_of(q, k, self.scale, None, rows.hidden)
        of_query, of_key = (x.squeeze(-1).permute(1, 2, 0) for x in rows.bias)
        return logits_of(q, k, self.scale, (of_query, of_key), rows.hidden)


Earlier = Stock | Plain
