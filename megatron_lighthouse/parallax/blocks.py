"""Parallax over parts: see `Block`. Near are q and r [n, B, H, D], far centred keys and values [m, B, G, D].

    p = softmax_j(scale q·k_j),  u_j = r·k_j,  v̄ = Σ p v,  t̄ = Σ p u,  C = Σ p (u - t̄) v,  o = v̄ - C

(arXiv 2605.29157, in its covariance form). A part keeps v̄, o and t̄: v̄ (1 + t̄) - Σ p u v would be a difference of what
grows with t̄, and o made of v̄ and C in 16 bits would be rounded three times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Mask, Part, Tensors
from megatron_lighthouse.parallax import telemetry
from megatron_lighthouse.softmax.blocks import for_each_head, heads_first, tokens_first


@dataclass
class Moments(Part):
    """Averages v̄, o [n, B, H, D] and t̄ [n, B, H, 1]."""

    def merge(self, other: Part) -> None:
        """Of two sets of weights α and β: α o + β o' - α β (t̄ - t̄') (v̄ - v̄'), and so β (o' - α …), which is rounded once."""
        share = (self.lse - torch.logaddexp(self.lse, other.lse)).exp().permute(2, 0, 1).unsqueeze(-1)
        (value, _, mean), (other_value, other_output, other_mean) = self.averages, other.averages
        between = share * (mean - other_mean) * (value.to(mean.dtype) - other_value)
        super().merge(replace(other, averages=(other_value, other_output - between, other_mean)))


@dataclass(frozen=True)
class Attention:
    """What the implementations share."""

    scale: float
    window: int | None = None
    """Keys that a query sees, itself among them; None: all up to itself."""
    cu_seqlens: Tensor | None = None
    """Documents of one sequence on one rank: a query sees those of its own."""

    def bounds(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        """[n] int32 each: where the document of each token starts, and where it ends. Asks the device nothing."""
        if self.cu_seqlens is None:
            return None
        places = self.cu_seqlens.int()
        starts, ends = (x.repeat_interleave(places.diff(), output_size=tokens) for x in (places[:-1], places[1:]))
        return starts, ends

    def output(self, part: Part) -> Tensor:
        value, output, _ = part.averages
        telemetry.record(value, output)
        return output


class Kernels(Attention):
    """Triton's, on a GPU: documents and a window within whole sequences alone."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        from megatron_lighthouse.kernels.parallax import forward

        (q, r), (k, v) = near, far
        bounds = self.bounds(q.shape[0])
        *averages, lse = forward(q, r, k, v, self.scale, self.window, mask.causal, None if bounds is None else bounds[0])
        return Moments(tuple(averages), lse)

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        from megatron_lighthouse.kernels.parallax import backward

        (q, r), (k, v), (value, output, mean) = near, far, part.averages
        how = (self.scale, self.window, mask.causal, self.bounds(grad.shape[0]))
        dq, dr, dk, dv = backward(grad, (q, r), (k, v), (value, output, mean), part.lse, *how)
        return (dq, dr), (dk, dv)


class Plain(Attention):
    """The formulas in plain PyTorch, some queries at a time: any device and dtype."""

    ELEMENTS: ClassVar = 1 << 25
    """Logits that are held at a time, in several copies."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        q, r, k, v = for_each_head(*near, *far)
        found: list[list[Tensor]] = [[], [], [], []]
        for rows in self._parts(q, k):
            logits = self._logits(q, k, rows, mask)
            lse = logits.logsumexp(-1)
            weights = (logits - lse.masked_fill(lse.isinf(), 0).unsqueeze(-1)).exp()
            u = r[:, :, rows] @ k.transpose(2, 3)
            mean = (weights * u).sum(-1, keepdim=True)
            value = weights @ v
            for all_rows, x in zip(found, (value, value - (weights * (u - mean)) @ v, mean, lse), strict=True):
                all_rows.append(x)
        value, output, mean, lse = (torch.cat(x, 2) for x in found)
        dtype = near[0].dtype
        return Moments((tokens_first(value).to(dtype), tokens_first(output).to(dtype), tokens_first(mean)), lse)

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        """With t = dO·o, b = dO·v̄ and a = dO·v: the gradients of logits p ((a - t) + (t̄ - u) (a - b)), and of u -p (a - b)."""
        q, r, k, v = for_each_head(*near, *far)
        g, value, output, mean = (x.to(q.dtype) for x in heads_first(grad, *part.averages))
        of_output, of_value = ((g * x).sum(-1, keepdim=True) for x in (output, value))
        dq, dr, dk, dv = [], [], torch.zeros_like(k), torch.zeros_like(v)
        for rows in self._parts(q, k):
            g_rows, r_rows = g[:, :, rows], r[:, :, rows]
            weights = (self._logits(q, k, rows, mask) - part.lse[:, :, rows].unsqueeze(-1)).exp()
            below = mean[:, :, rows] - r_rows @ k.transpose(2, 3)
            dv += (weights * (1 + below)).transpose(2, 3) @ g_rows
            along = g_rows @ v.transpose(2, 3)
            past = along - of_value[:, :, rows]
            of_logits = weights * (along - of_output[:, :, rows] + below * past) * self.scale
            of_u = -weights * past
            dq.append(of_logits @ k)
            dr.append(of_u @ k)
            dk += of_logits.transpose(2, 3) @ q[:, :, rows] + of_u.transpose(2, 3) @ r_rows
        dk, dv = (x.unflatten(1, (far[0].shape[2], -1)).sum(2) for x in (dk, dv))
        dtype = near[0].dtype
        d_q, d_r, d_k, d_v = (tokens_first(x).to(dtype) for x in (torch.cat(dq, 2), torch.cat(dr, 2), dk, dv))
        return (d_q, d_r), (d_k, d_v)

    def _parts(self, q: Tensor, k: Tensor) -> list[slice]:
        rows = max(1, self.ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
        return [slice(i, i + rows) for i in range(0, q.shape[2], rows)]

    def _logits(self, q: Tensor, k: Tensor, rows: slice, mask: Mask) -> Tensor:
        logits = q[:, :, rows] @ k.transpose(2, 3) * self.scale
        if not mask.causal and self.window is None:
            return logits
        near = _positions(mask.near, q)[rows].unsqueeze(1)
        far = _positions(mask.far, k)
        hidden = far > near
        if self.window is not None:
            hidden |= far <= near - self.window
        if (bounds := self.bounds(k.shape[2])) is not None:
            hidden |= far < bounds[0][rows].unsqueeze(1)
        return logits.masked_fill_(hidden, -torch.inf)


def _positions(chunks: tuple[int, ...], x: Tensor) -> Tensor:
    """[n], the places in the sequence of the rows of x [B, H, n, D]."""
    length = x.shape[2] // len(chunks)
    return (torch.tensor(chunks, device=x.device).unsqueeze(1) * length + torch.arange(length, device=x.device)).flatten()
