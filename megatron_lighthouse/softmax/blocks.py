"""Blocks: attention of some queries to some keys that returns its log-sum-exp, so that results over parts can be merged.

Queries are [n, B, H, D], keys and values [m, B, G, D], log-sum-exps [B, H, n] in fp32 (fp64 for fp64), natural logarithm.
Where `causal`, n = m. A backward is given the output and the log-sum-exp over *all* keys, and returns this part's gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.softmax.backends import choose_for_blocks

aten = torch.ops.aten


class Cudnn:
    """cuDNN's attention in torch."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = heads_first(query, key, value)
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return tokens_first(out), lse.flatten(2)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        g, q, k, v, o = heads_first(grad, query, key, value, out)
        none = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout, so its seed and offset are not read
        lengths = (None, None, q.shape[2], k.shape[2])
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            g, q, k, v, o, lse.contiguous().unsqueeze(-1), none, none, None, *lengths, 0.0, causal, scale=scale
        )
        return tokens_first(grads[0]), tokens_first(grads[1]), tokens_first(grads[2])


class Flash2:
    """FlashAttention 2 in torch; repeats to the bit where torch is asked for it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        lengths = (None, None, q.shape[1], k.shape[1])
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, scale=scale)
        return out.transpose(0, 1), lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        g, q, k, v, o = (x.transpose(0, 1) for x in (grad, query, key, value, out))
        lengths = (None, None, q.shape[1], k.shape[1])
        none = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            g.contiguous(), q, k, v, o.contiguous(), lse.contiguous(), *lengths, 0.0, causal, none, none, scale=scale
        )
        return grads[0].transpose(0, 1), grads[1].transpose(0, 1), grads[2].transpose(0, 1)


class Plain:
    """The formula in plain PyTorch, some queries at a time: any device and dtype."""

    ELEMENTS = 1 << 26
    """Scores that are held at a time."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = self._spread(query, key, value)
        outs, lses = [], []
        for rows in self._parts(q, k):
            scores = self._scores(q, k, rows, causal, scale)
            lse = scores.logsumexp(-1)
            outs.append((scores - lse.unsqueeze(-1)).exp() @ v)
            lses.append(lse)
        return tokens_first(torch.cat(outs, 2)).to(query.dtype), torch.cat(lses, 2)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._spread(query, key, value)
        g, o = (x.to(q.dtype) for x in heads_first(grad, out))
        delta = (g * o).sum(-1, keepdim=True)
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for rows in self._parts(q, k):
            weights = (self._scores(q, k, rows, causal, scale) - lse[:, :, rows].unsqueeze(-1)).exp()
            dv += weights.transpose(2, 3) @ g[:, :, rows]
            change = weights * (g[:, :, rows] @ v.transpose(2, 3) - delta[:, :, rows]) * scale
            dq.append(change @ k)
            dk += change.transpose(2, 3) @ q[:, :, rows]
        dk, dv = (x.unflatten(1, (key.shape[2], -1)).sum(2) for x in (dk, dv))
        grads = (tokens_first(x).to(query.dtype) for x in (torch.cat(dq, 2), dk, dv))
        return next(grads), next(grads), next(grads)

    def _spread(self, *tensors: Tensor) -> list[Tensor]:
        """[B, H, ·, D] in the dtype of sums, a key/value head repeated for each of its queries."""
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        heads = tensors[0].shape[2]
        return [x.to(wide).repeat_interleave(heads // x.shape[1], 1) for x in heads_first(*tensors)]

    def _parts(self, q: Tensor, k: Tensor) -> list[slice]:
        rows = max(1, self.ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
        return [slice(i, i + rows) for i in range(0, q.shape[2], rows)]

    def _scores(self, q: Tensor, k: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
        scores = q[:, :, rows] @ k.transpose(2, 3) * scale
        if causal:
            positions = torch.arange(k.shape[2], device=q.device)
            scores.masked_fill_(positions > positions[rows].unsqueeze(1), -torch.inf)
        return scores


Block = Cudnn | Flash2 | Plain
BLOCKS: dict[str, Block] = {"cudnn": Cudnn(), "fa2": Flash2(), "sdpa": Plain()}
"""By their names in `--lighthouse-inner`."""


def block_for(name: str, query: Tensor, key: Tensor) -> Block:
    """The fastest of BLOCKS for these rows, or the one that `name` forces.

    Raises:
        ValueError: a backend that is forced and is not there, cannot take these rows, or does not return its log-sum-exp.
    """
    return BLOCKS[
        choose_for_blocks(name, list(BLOCKS), query.device, query.dtype, query.shape[2], key.shape[2], query.shape[3])
    ]


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[n, B, H, D] -> [B, H, n, D], as views."""
    return [x.permute(1, 2, 0, 3) for x in tensors]


def tokens_first(x: Tensor) -> Tensor:
    """[B, H, n, D] -> [n, B, H, D], as a view."""
    return x.permute(2, 0, 1, 3)
