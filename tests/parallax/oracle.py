"""Parallax in float64 as the paper writes it, N x N, for autograd: o = v̄ (1 + t̄) - Σ p u v."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAMES = ("out", "dq", "dr", "dk", "dv")


def formula(
    query: Tensor, r: Tensor, key: Tensor, value: Tensor, scale: float | None = None, window: int | None = None
) -> Tensor:
    """[N, B, H, D] twice and [N, B, G, D] twice -> [N, B, H, D]."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    place = torch.arange(len(query), device=query.device)
    back = place.unsqueeze(1) - place
    hidden = (back < 0) | (back >= (window or len(query)))
    weights = (scale * torch.einsum("nbhd,mbhd->bhnm", query, key)).masked_fill(hidden, -torch.inf).softmax(-1)
    u = torch.einsum("nbhd,mbhd->bhnm", r, key)
    mean = torch.einsum("bhnm,bhnm->nbh", weights, u).unsqueeze(-1)
    values, products = (torch.einsum("bhnm,mbhd->nbhd", x, value) for x in (weights, weights * u))
    return values * (1 + mean) - products


def inputs(
    tokens: int, batch: int, heads: int, groups: int, dim: int, r: float = 0.3, mean: float = 0.0, seed: int = 0
) -> list[Tensor]:
    """q, r, k, v and a gradient of the output, float64; r's channels of this size, and keys with this mean in all of them."""
    generator = torch.Generator().manual_seed(seed)
    query, of_r, key, value, grad = (
        torch.randn(tokens, batch, n, dim, generator=generator, dtype=torch.float64)
        for n in (heads, heads, groups, groups, heads)
    )
    return [query, r * of_r, key + mean, value, grad]


def with_grads(attention: object, tensors: list[Tensor], **how: object) -> list[Tensor]:
    """Output and gradients of q, r, k, v."""
    *leaves, grad = (x.detach().clone().requires_grad_() for x in tensors)
    out = attention(*leaves, **how)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.detach())]
