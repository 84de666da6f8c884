"""Softmax attention over parts: see `Block`. Near is the query [n, B, H, D], far key and value [m, B, G, D]; causal: n = m.

The one average is the output. With a window the near rows are the last of the far ones, n <= m.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Block, Mask, Part, Tensors
from megatron_lighthouse.gpu import capability_of
from megatron_lighthouse.softmax.backends import choose_for_blocks
from megatron_lighthouse.softmax.base import Softmax, batch_first
from megatron_lighthouse.softmax.flash_blocks import Flash3, Flash4
from megatron_lighthouse.softmax.rows import SHARDS, RowKind
from megatron_lighthouse.sums import accumulation_dtype

aten = torch.ops.aten


class Cudnn(Softmax):
    """cuDNN's attention in torch."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        q, k, v = heads_first(*near, *far)
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, mask.causal, False, scale=self.scale)
        return Part((tokens_first(out),), lse.flatten(2))

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        g, q, k, v, o = heads_first(grad, *near, *far, *part.averages)
        none = torch.empty((), dtype=torch.int64, device=q.device)  # no dropout, so its seed and offset are not read
        lengths = (None, None, q.shape[2], k.shape[2])
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            g, q, k, v, o, part.lse.contiguous().unsqueeze(-1), none, none, None, *lengths, 0.0, mask.causal, scale=self.scale
        )
        return (tokens_first(grads[0]),), (tokens_first(grads[1]), tokens_first(grads[2]))


class Flash2(Softmax):
    """FlashAttention 2 in torch; repeats to the bit where torch is asked for it."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        q, k, v = batch_first(*near, *far)
        lengths = (None, None, q.shape[1], k.shape[1])
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *lengths, 0.0, mask.causal, False, **self.flash_options)
        return Part((out.transpose(0, 1),), lse)

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        g, q, k, v, o = batch_first(grad, *near, *far, *part.averages)
        lengths = (None, None, q.shape[1], k.shape[1])
        none = torch.zeros(2, dtype=torch.uint64, device=q.device)
        given = (g.contiguous(), q, k, v, o.contiguous(), part.lse.contiguous(), *lengths)
        grads = aten._flash_attention_backward(*given, 0.0, mask.causal, none, none, **self.flash_options)
        of_query, *others = batch_first(*grads)
        return (of_query,), tuple(others)


class Plain(Softmax):
    """The formula in plain PyTorch, some queries at a time: any device and dtype."""

    ELEMENTS: ClassVar = 1 << 26
    """Scores that are held at a time."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        q, k, v = for_each_head(*near, *far)
        outs, lses = [], []
        for rows, seen in self._parts(q, k):
            scores = self._scores(q, k, rows, seen, mask.causal)
            lse = scores.logsumexp(-1)
            outs.append((scores - lse.unsqueeze(-1)).exp() @ v[:, :, seen])
            lses.append(lse)
        return Part((tokens_first(torch.cat(outs, 2)).to(near[0].dtype),), torch.cat(lses, 2))

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        q, k, v = for_each_head(*near, *far)
        g, o = (x.to(q.dtype) for x in heads_first(grad, *part.averages))
        delta = (g * o).sum(-1, keepdim=True)
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for rows, seen in self._parts(q, k):
            weights = (self._scores(q, k, rows, seen, mask.causal) - part.lse[:, :, rows].unsqueeze(-1)).exp()
            dv[:, :, seen] += weights.transpose(2, 3) @ g[:, :, rows]
            change = weights * (g[:, :, rows] @ v[:, :, seen].transpose(2, 3) - delta[:, :, rows]) * self.scale
            dq.append(change @ k[:, :, seen])
            dk[:, :, seen] += change.transpose(2, 3) @ q[:, :, rows]
        dk, dv = (x.unflatten(1, (far[0].shape[2], -1)).sum(2) for x in (dk, dv))
        of_query, *others = (tokens_first(x).to(near[0].dtype) for x in (torch.cat(dq, 2), dk, dv))
        return (of_query,), tuple(others)

    def _parts(self, q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
        """Some near rows at a time, and the far rows that they may see."""
        ahead = k.shape[2] - q.shape[2]
        if self.window is None:
            rows = max(1, self.ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
            return [(slice(i, i + rows), slice(None)) for i in range(0, q.shape[2], rows)]
        rows = max(1, min(self.window, self.ELEMENTS // (2 * q.shape[0] * q.shape[1] * max(1, self.window))))
        seen = [slice(max(0, i + ahead - self.window), i + ahead + rows) for i in range(0, q.shape[2], rows)]
        return [(slice(i, i + rows), far) for i, far in zip(range(0, q.shape[2], rows), seen, strict=True)]

    def _scores(self, q: Tensor, k: Tensor, rows: slice, seen: slice, causal: bool) -> Tensor:
        scores = q[:, :, rows] @ k[:, :, seen].transpose(2, 3) * self.scale
        if causal:
            far = torch.arange(k.shape[2], device=q.device)[seen]
            ahead = 0 if self.window is None else k.shape[2] - q.shape[2]
            near = (torch.arange(q.shape[2], device=q.device) + ahead)[rows].unsqueeze(1)
            hidden = far > near
            if self.window is not None:
                hidden |= far < near - self.window
            scores.masked_fill_(hidden, -torch.inf)
        return scores


BLOCKS: dict[str, type[Flash4 | Flash3 | Cudnn | Flash2 | Plain]] = {
    "fa4": Flash4,
    "fa3": Flash3,
    "cudnn": Cudnn,
    "fa2": Flash2,
    "sdpa": Plain,
}
"""By their names in `--lighthouse-inner`."""


def block_for(
    name: str,
    query: Tensor,
    key: Tensor,
    scale: float,
    value_dim: int | None = None,
    window: int | None = None,
    over: str = SHARDS,
) -> Block:
    """The fastest of BLOCKS for these rows, or the one that `name` forces.

    Args:
        value_dim: of the values, where it is not D.
        window: rows before its own that a row sees, where it is not all.
        over: what it attends over, in words.

    Raises:
        ValueError: a backend that is forced and is not there, cannot take these rows, or does not return its log-sum-exp.
    """
    known = [other for other in BLOCKS if window is None or _takes_windows(other, query)]
    return BLOCKS[choose_for_blocks(name, known, RowKind.of(query, key, value_dim), over)](scale, window)


def _takes_windows(name: str, query: Tensor) -> bool:
    """cuDNN's in torch has none, and FlashAttention 4's backward none of 256 channels on Blackwell."""
    return name != "cudnn" and not (name == "fa4" and query.shape[3] == 256 and capability_of(query.device) >= 100)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[n, B, H, D] -> [B, H, n, D], as views."""
    return [x.permute(1, 2, 0, 3) for x in tensors]


def for_each_head(*tensors: Tensor) -> list[Tensor]:
    """`heads_first` in the dtype of sums, [B, H, n, D], a key/value head repeated for each head of the first, the queries."""
    wide, heads = accumulation_dtype(tensors[0]), tensors[0].shape[2]
    return [x.to(wide).repeat_interleave(heads // x.shape[1], 1) for x in heads_first(*tensors)]


def tokens_first(x: Tensor) -> Tensor:
    """[B, H, n, D] -> [n, B, H, D], as a view."""
    return x.permute(2, 0, 1, 3)
