"""Wall in float64 as its formula is written, N x N x K, for autograd: the exponent of a pair is a sum over the tokens between."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAMES = ("out", "lse", "dq", "dk", "dv", "dg", "dγ")


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    scalar_gate: Tensor | None = None,
    scale: float | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [n, B, H, V] and log-sum-exp [B, H, n]; `first` [n]: the first key that each row sees."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    place = torch.arange(len(query))
    first = torch.zeros_like(place) if first is None else first
    hidden = (place > place[:, None]) | (place < first[:, None])
    passed = ((place[:, None, None] >= place) & (place > place[:, None])).to(gate)  # [i, j, t]: j < t <= i
    exponents = torch.einsum("ijt,tbhk->ijbhk", passed, gate.clamp(min=-1e4))
    logits = scale * torch.einsum("ibhk,jbhk,ijbhk->bhij", query, key, exponents.exp())
    if scalar_gate is not None:
        logits = logits + torch.einsum("ijt,tbh->bhij", passed, scalar_gate.clamp(min=-1e4))
    logits = logits.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhij,jbhv->ibhv", logits.softmax(-1), value), logits.logsumexp(-1)


def inputs(
    tokens: int, batch: int, heads: int, groups: int, key_dim: int, value_dim: int, gate: float, scalar: bool = False, seed: int = 0
) -> list[Tensor]:
    """q, k, v, g, γ if asked for, and a gradient of the output, float64; gates are around `gate`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, key_dim), (groups, key_dim), (groups, value_dim), (heads, value_dim))
    query, key, value, grad = (torch.randn(tokens, batch, *size, generator=generator, dtype=torch.float64) for size in sizes)
    spread = torch.rand(tokens, batch, heads, key_dim + 1, generator=generator, dtype=torch.float64) + 0.5
    gates = [gate * spread[..., 1:]] + [gate * spread[..., 0]] * scalar
    return [query, key, value, *gates, grad]


def with_grads(tensors: list[Tensor], scale: float | None = None, first: Tensor | None = None) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients of all inputs."""
    *leaves, grad = (x.detach().clone().requires_grad_() for x in tensors)
    out, lse = formula(*leaves, **{"scale": scale, "first": first})  # type: ignore[arg-type]
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad.detach())]
