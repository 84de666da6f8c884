"""Softmax attention over parts: see `Block`. Near is the query [n, B, H, D], far key and value [m, B, G, D]; causal: n = m.

The one average is the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Block, Mask, Part, Tensors
from megatron_lighthouse.softmax.backends import choose_for_blocks

aten = torch.ops.aten


@dataclass(frozen=True)
class Softmax:
    """What the backends share."""

    scale: float

    def output(self, part: Part) -> Tensor:
        return part.averages[0]


class Cudnn(Softmax):
    """cuDNN's attention in torch."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        q, k, v = heads_first(*near, *far)
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, mask.causal, False, scale=self.scale)
        return Part((tokens_first(out),), lse.flatten(2))

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        g, q, k, v, o = heads_first(grad, *near, *far, *part.averages)
        none = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout, so its seed and offset are not read
        lengths = (None, None, q.shape[2], k.shape[2])
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            g, q, k, v, o, part.lse.contiguous().unsqueeze(-1), none, none, None, *lengths, 0.0, mask.causal, scale=self.scale
        )
        return (tokens_first(grads[0]),), (tokens_first(grads[1]), tokens_first(grads[2]))


class Flash2(Softmax):
    """FlashAttention 2 in torch; repeats to the bit where torch is asked for it."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        q, k, v = (x.transpose(0, 1) for x in (*near, *far))
        lengths = (None, None, q.shape[1], k.shape[1])
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *lengths, 0.0, mask.causal, False, scale=self.scale)
        return Part((out.transpose(0, 1),), lse)

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        g, q, k, v, o = (x.transpose(0, 1) for x in (grad, *near, *far, *part.averages))
        lengths = (None, None, q.shape[1], k.shape[1])
        none = torch.zeros(2, dtype=torch.uint64, device=q.device)
        given = (g.contiguous(), q, k, v, o.contiguous(), part.lse.contiguous(), *lengths)
        grads = aten._flash_attention_backward(*given, 0.0, mask.causal, none, none, scale=self.scale)
        return (grads[0].transpose(0, 1),), (grads[1].transpose(0, 1), grads[2].transpose(0, 1))


class Plain(Softmax):
    """The formula in plain PyTorch, some queries at a time: any device and dtype."""

    ELEMENTS: ClassVar = 1 << 26
    """Scores that are held at a time."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        q, k, v = self._spread(*near, *far)
        outs, lses = [], []
        for rows in self._parts(q, k):
            scores = self._scores(q, k, rows, mask.causal)
            lse = scores.logsumexp(-1)
            outs.append((scores - lse.unsqueeze(-1)).exp() @ v)
            lses.append(lse)
        return Part((tokens_first(torch.cat(outs, 2)).to(near[0].dtype),), torch.cat(lses, 2))

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        q, k, v = self._spread(*near, *far)
        g, o = (x.to(q.dtype) for x in heads_first(grad, *part.averages))
        delta = (g * o).sum(-1, keepdim=True)
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for rows in self._parts(q, k):
            weights = (self._scores(q, k, rows, mask.causal) - part.lse[:, :, rows].unsqueeze(-1)).exp()
            dv += weights.transpose(2, 3) @ g[:, :, rows]
            change = weights * (g[:, :, rows] @ v.transpose(2, 3) - delta[:, :, rows]) * self.scale
            dq.append(change @ k)
            dk += change.transpose(2, 3) @ q[:, :, rows]
        dk, dv = (x.unflatten(1, (far[0].shape[2], -1)).sum(2) for x in (dk, dv))
        of_query, *others = (tokens_first(x).to(near[0].dtype) for x in (torch.cat(dq, 2), dk, dv))
        return (of_query,), tuple(others)

    def _spread(self, *tensors: Tensor) -> list[Tensor]:
        """[B, H, ·, D] in the dtype of sums, a key/value head repeated for each of its queries."""
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        heads = tensors[0].shape[2]
        return [x.to(wide).repeat_interleave(heads // x.shape[1], 1) for x in heads_first(*tensors)]

    def _parts(self, q: Tensor, k: Tensor) -> list[slice]:
        rows = max(1, self.ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
        return [slice(i, i + rows) for i in range(0, q.shape[2], rows)]

    def _scores(self, q: Tensor, k: Tensor, rows: slice, causal: bool) -> Tensor:
        scores = q[:, :, rows] @ k.transpose(2, 3) * self.scale
        if causal:
            positions = torch.arange(k.shape[2], device=q.device)
            scores.masked_fill_(positions > positions[rows].unsqueeze(1), -torch.inf)
        return scores


BLOCKS: dict[str, type[Cudnn | Flash2 | Plain]] = {"cudnn": Cudnn, "fa2": Flash2, "sdpa": Plain}
"""By their names in `--lighthouse-inner`."""


def block_for(name: str, query: Tensor, key: Tensor, scale: float) -> Block:
    """The fastest of BLOCKS for these rows, or the one that `name` forces.

    Raises:
        ValueError: a backend that is forced and is not there, cannot take these rows, or does not return its log-sum-exp.
    """
    rows = (query.device, query.dtype, query.shape[2], key.shape[2], query.shape[3])
    return BLOCKS[choose_for_blocks(name, list(BLOCKS), *rows)](scale)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[n, B, H, D] -> [B, H, n, D], as views."""
    return [x.permute(1, 2, 0, 3) for x in tensors]


def tokens_first(x: Tensor) -> Tensor:
    """[B, H, n, D] -> [n, B, H, D], as a view."""
    return x.permute(2, 0, 1, 3)
