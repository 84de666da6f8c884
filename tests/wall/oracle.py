"""Wall in float64 as its formula stands, N x N x K, for autograd: each pair's gates are summed by themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv", "dg")


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
    # [i, j, t]: whether gate t stands between key j and query i
    between = ((place > place.view(-1, 1)) & (place <= place.view(-1, 1, 1))).to(query.dtype)
    exponents = torch.einsum("ijt,tbhk->ijbhk", between, gate)
    logits = scale * torch.einsum("ibhk,jbhk,ijbhk->bhij", query, key, exponents.exp())
    if scalar_gate is not None:
        logits = logits + torch.einsum("ijt,tbh->bhij", between, scalar_gate)
    logits = logits.masked_fill(hidden, -torch.inf)
    if sink is None:
        weights = logits.softmax(-1)
    else:
        nowhere = sink.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, nowhere], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhij,jbhv->ibhv", weights, value)


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


def with_grads(attention: object, tensors: list[Tensor], **how: object) -> list[Tensor]:
    """Output and gradients of all inputs; those by name in `how` take part as they are."""
    *leaves, grad = (x.detach().clone().requires_grad_() for x in tensors)
    out = attention(*leaves, **how)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.detach())]
