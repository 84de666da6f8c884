"""Wall in float64 as its formula is written, N x N x N x K: the exponent of a pair is a sum over the tokens between."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAMES = ("out", "lse", "dq", "dk", "dv", "dg", "dγ")


def logits_of(
    query: Tensor,
    key: Tensor,
    gate: Tensor,
    scalar_gate: Tensor | None = None,
    scale: float | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """[B, H, n, n]; `first` [n]: the first key that each row sees."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    key = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
    place = torch.arange(len(query))
    first = torch.zeros_like(place) if first is None else first
    passed = ((place[:, None, None] >= place) & (place > place[:, None])).to(gate)  # [i, j, t]: j < t <= i
    exponents = torch.einsum("ijt,tbhk->ijbhk", passed, gate.clamp(min=-1e4))
    logits = scale * torch.einsum("ibhk,jbhk,ijbhk->bhij", query, key, exponents.exp())
    if scalar_gate is not None:
        logits = logits + torch.einsum("ijt,tbh->bhij", passed, scalar_gate.clamp(min=-1e4))
    return logits.masked_fill((place > place[:, None]) | (place < first[:, None]), -torch.inf)


def attended(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output [n, B, H, V] and log-sum-exp [B, H, n]."""
    value = value.repeat_interleave(logits.shape[1] // value.shape[2], 2)
    return torch.einsum("bhij,jbhv->ibhv", logits.softmax(-1), value), logits.logsumexp(-1)


def inputs(
    tokens: int,
    batch: int,
    heads: int,
    groups: int,
    key_dim: int,
    value_dim: int,
    gate: float,
    scalar: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v, g, γ if asked for, and a gradient of the output, float64; gates are around `gate`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, key_dim), (groups, key_dim), (groups, value_dim), (heads, value_dim))
    query, key, value, grad = (torch.randn(tokens, batch, *size, generator=generator, dtype=torch.float64) for size in sizes)
    spread = torch.rand(tokens, batch, heads, key_dim + 1, generator=generator, dtype=torch.float64) + 0.5
    gates = [gate * spread[..., 1:]] + [gate * spread[..., 0]] * scalar
    return [query, key, value, *gates, grad]


def with_grads(
    tensors: list[Tensor], scale: float | None = None, first: Tensor | None = None, whole: tuple[Tensor, Tensor] | None = None
) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients of all inputs; `whole`: output and log-sum-exp of rows that see other keys too."""
    *leaves, grad = (x.detach().clone().requires_grad_() for x in tensors)
    query, key, value, *gates = leaves
    logits = logits_of(query, key, *gates, **{"scale": scale, "first": first})  # type: ignore[arg-type]
    out, lse = attended(logits, value)
    of_rows, of_all = (out, lse) if whole is None else whole
    weights = (logits - of_all.unsqueeze(-1)).exp().detach()
    values = value.repeat_interleave(query.shape[2] // value.shape[2], 2)
    along = torch.einsum("ibhv,jbhv->bhij", grad, values) - (grad * of_rows).sum(-1).permute(1, 2, 0).unsqueeze(-1)
    seen = weights > 0
    loss = ((weights * along).detach()[seen] * logits[seen]).sum() + torch.einsum(
        "bhij,ibhv,jbhv->", weights, grad.detach(), values
    )
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]
