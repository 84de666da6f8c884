"""Wall in float64 as its formula stands, N x N x K, for autograd, with differences of prefix sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    scalar_gate: Tensor | None = None,
    sink: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """As `wall_attention`."""
    scale, tokens = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale, len(query)
    key, value, gate = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value, gate))
    place = torch.arange(tokens)
    hidden = (place > place.unsqueeze(1)) | (place <= place.unsqueeze(1) - (window or tokens))
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, place, right=True)
        hidden = hidden | (document != document.unsqueeze(1))
    # what is hidden may be above 0, and exp of it inf
    shown = place <= place.unsqueeze(1)
    exponents = torch.where(shown.view(tokens, tokens, 1, 1, 1), _between(gate), 0)
    logits = scale * torch.einsum("ibhk,jbhk,ijbhk->bhij", query, key, exponents.exp())
    if scalar_gate is not None:
        logits = logits + torch.where(shown.view(tokens, tokens, 1, 1), _between(scalar_gate), 0).permute(2, 3, 0, 1)
    logits = logits.masked_fill(hidden, -torch.inf)
    if sink is None:
        weights = logits.softmax(-1)
    else:
        nowhere = sink.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, nowhere], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhij,jbhv->ibhv", weights, value)


def _between(gate: Tensor) -> Tensor:
    """[N, N, ...], of query i and key j: the gates after j and up to i."""
    sums = gate.cumsum(0)
    return sums.unsqueeze(1) - sums


def inputs(
    tokens: int,
    batch: int,
    heads: int,
    groups: int,
    dims: tuple[int, int],
    gate: float = -0.3,
    tied: bool = False,
    scalar: float | None = None,
    sink: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v, g, γ and β where asked for, and a gradient of the output, float64; gates are spread about this mean."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gates(mean: float, *shape: int) -> Tensor:
        return mean * (0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64))

    query, key = normal(tokens, batch, heads, dims[0]), normal(tokens, batch, groups, dims[0])
    value, grad = normal(tokens, batch, groups, dims[1]), normal(tokens, batch, heads, dims[1])
    found = [query, key, value, gates(gate, tokens, batch, groups if tied else heads, dims[0])]
    if scalar is not None:
        found.append(gates(scalar, tokens, batch, heads))
    if sink:
        found.append(normal(heads))
    return [*found, grad]


def with_grads(attention: Callable[..., Tensor], tensors: list[Tensor], **how: Any) -> list[Tensor]:
    """Output and gradients of all inputs, of which a scalar gate has three dimensions, and a sink one."""
    *leaves, grad = (x.detach().clone().requires_grad_() for x in tensors)
    more = {"scalar_gate" if x.dim() == 3 else "sink": x for x in leaves[4:]}
    out = attention(*leaves[:4], **more, **how)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.detach())]
