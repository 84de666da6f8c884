"""Stand-ins for FlashAttention 4 and 3 in plain PyTorch: what their forward and backward take and give, by their own names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_lighthouse.softmax import backends, blocks, rows

Pair = tuple[int | None, int | None]
ASKED: list[bool] = []
"""What `deterministic` was in each backward."""


def logits_of(q: Tensor, k: Tensor, scale: float, causal: bool, window: Pair) -> Tensor:
    """[B, H, n, m], of [B, n, H, D] and [B, m, G, D]: rows are counted from the last ones; None and -1 hide nothing."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bnhd,bmhd->bhnm", q.to(wide), k.to(wide)) * scale
    past = torch.arange(q.shape[1]).unsqueeze(1) + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    left, right = (None if side is None or side < 0 else side for side in window)
    right = 0 if causal else right
    hidden = torch.zeros_like(past, dtype=torch.bool)
    if left is not None:
        hidden |= past > left
    if right is not None:
        hidden |= past < -right
    return logits.masked_fill(hidden, -torch.inf)


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: Pair) -> tuple[Tensor, Tensor]:
    """[B, n, H, D] and [B, H, n]."""
    assert q.dtype == k.dtype == v.dtype
    logits = logits_of(q, k, scale, causal, window)
    spread = v.repeat_interleave(q.shape[2] // v.shape[2], 2).to(logits.dtype)
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), spread).to(q.dtype), logits.logsumexp(-1)


def gradients(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool, window: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v, from output and log-sum-exp as they are given."""
    assert q.dtype == k.dtype == v.dtype == o.dtype == g.dtype
    assert o.shape == g.shape == (*q.shape[:3], v.shape[3])
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.is_contiguous()
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    weights = (logits_of(q, k, scale, causal, window) - lse.unsqueeze(-1)).exp()
    ratio, groups = q.shape[2] // k.shape[2], k.shape[2]
    g, o, wide_q, wide_k, wide_v = (x.to(lse.dtype) for x in (g, o, q, k, v))
    wide_k, wide_v = (x.repeat_interleave(ratio, 2) for x in (wide_k, wide_v))
    past = torch.einsum("bnhd,bmhd->bhnm", g, wide_v) - (g * o).sum(-1).transpose(1, 2).unsqueeze(-1)
    change = weights * past * scale
    dq = torch.einsum("bhnm,bmhd->bnhd", change, wide_k)
    dk, dv = (
        torch.einsum("bhnm,bnhd->bmhd", weight, x).unflatten(2, (groups, ratio)).sum(3)
        for weight, x in ((change, wide_q), (weights, g))
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def four_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    window_size: Pair = (None, None),
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    out, lse = attended(q, k, v, softmax_scale, causal, window_size)
    return out, lse if return_lse else None


def four_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool = False,
    *,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    ASKED.append(deterministic)
    return gradients(dout, q, k, v, out, lse, softmax_scale, causal, (window_size_left, window_size_right))


def three_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    out, lse = attended(q, k, v, softmax_scale, causal, window_size)
    return (out, lse) if return_attn_probs else out


def three_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    deterministic: bool = False,
) -> Tensor:
    """Writes dq, dk and dv; answers what nobody asked for."""
    ASKED.append(deterministic)
    window = (window_size_left, window_size_right)
    found = gradients(dout, q, k, v, out, softmax_lse, softmax_scale, is_causal, window)
    for x, y in zip((dq, dk, dv), found, strict=True):
        x.copy_(y)
    return softmax_lse


FUNCTIONS: dict[str, dict[str, dict[str, Callable[..., Any]]]] = {
    "fa4": {
        "flash_attn.cute": {"flash_attn_func": four_forward},
        "flash_attn.cute.interface": {"_flash_attn_bwd": four_backward},
    },
    "fa3": {"flash_attn_interface": {"flash_attn_func": three_forward, "_flash_attn_backward": three_backward}},
}


def modules(*names: str) -> dict[str, ModuleType | None]:
    """Those of the backends `names`; the others' are hidden."""
    found: dict[str, ModuleType | None] = {}
    for name, of_backend in FUNCTIONS.items():
        for title, functions in of_backend.items():
            found[title] = module = ModuleType(title) if name in names else None
            if module is not None:
                vars(module).update(functions)
    return found


@contextmanager
def installed(*names: str, capability: int = 90, release: str | None = None) -> Iterator[None]:
    """As if these backends were there, on a GPU of this capability; nothing was chosen before.

    Args:
        release: why that of FlashAttention 4 is too old.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.dict(sys.modules, modules(*names)))
        for module, name, value in (
            (backends, "_functions", {}),
            (backends, "_choose", cache(backends._choose.__wrapped__)),
            (backends, "too_old", lambda package: release),
            (rows, "capability_of", lambda device: capability),
            (blocks, "capability_of", lambda device: capability),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield
