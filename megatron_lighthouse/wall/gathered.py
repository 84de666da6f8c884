"""What Lighthouse gathers for Wall: keys that have decayed to the end of their window, and the gates of rows.

Rows stand in the order of their last token. The gate of a row is the sum of those of the tokens after the last one of the row
before, up to its own last: 0 between a window and the one that it ends with. So between two rows lie the gates of all tokens
between their last ones, none positive, and any Wall attends to rows. A window's key is

    k̃ = mean_j k_j exp(Σ_{j<t<=last} g_t)

so that its logit is the mean of those that its tokens have for a later token's query. Queries and values are averaged as ever.
Ours; with gates of 0 it is Lighthouse without positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_lighthouse.gpu import triton_takes
from megatron_lighthouse.lighthouse.packed.maps import Maps
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sums import accumulation_dtype
from megatron_lighthouse.wall import gathered_reference as reference
from megatron_lighthouse.wall.decay import spread

if TYPE_CHECKING:
    from megatron_lighthouse.kernels.wall.gathered import Windows


def gather(
    take: Callable[..., tuple[Tensor, ...]], selection: Selection, query: Tensor, key: Tensor, value: Tensor, *gates: Tensor
) -> tuple[Tensor, ...]:
    """Rows of queries [S, B, H, K], decayed keys [S, B, heads of the gates, K], values, and gates in the dtype of sums.

    Args:
        take: `Steps.gather`, of this selection.
        gates: [n, B, H or G, K]; and scalar gates [n, B, H, 1] where there are.
    """
    if isinstance(selection.geometry, Packing):
        rows_q, _, rows_v = take(query, key.detach(), value)
    else:  # keys are gathered below, where they fade: values go in their place, which documents' kernels cannot
        rows_q, rows_v, _ = take(query, value, value.detach()[:, :, :0])
    gate, *scalar = (x.to(accumulation_dtype(query)) for x in gates)
    with profiled("gather"):
        rows_k, row_gates = _Rows.apply(key, gate, selection)
        return rows_q, rows_k, rows_v, row_gates, *(_Sums.apply(x, *reference.runs_of_tokens(selection)) for x in scalar)


class _Rows(torch.autograd.Function):
    """(key, gate, selection) -> rows of both, as `gathered_reference.gather`. Keeps key and gate."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, gate: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(key, gate)
        ctx.selection = selection
        return by_kernels(key, gate, selection) if triton_takes(key) else reference.gather(key, gate, selection)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_gates: Tensor) -> tuple[Tensor, Tensor, None]:
        key, gate = ctx.saved_tensors
        make = by_kernels_backward if triton_takes(key) else reference.gather_backward
        with profiled("gather backward"):
            dk, dg = make(key, gate, grad, grad_gates, ctx.selection)
            if dk.shape[2] != key.shape[2]:
                dk = dk.unflatten(2, (key.shape[2], -1)).sum(3)
            return dk.to(key.dtype), dg, None


class _Sums(torch.autograd.Function):
    """(gates, the row of each token, the tokens of each row) -> `gathered_reference.sums` of them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return reference.sums(gate, row, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reference.sums_backward(grad, *ctx.saved_tensors), None, None


def by_kernels(key: Tensor, gate: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """As `gathered_reference.gather`. Tokens in no window, of packed documents, are rows as they are."""
    from megatron_lighthouse.kernels.wall.gathered import gather

    rows, row_gates = gather(key, gate, _windows(selection))
    if isinstance(selection.geometry, Packing):
        loose, at = _loose(selection.geometry)
        rows[at], row_gates[at] = spread(key[loose], gate.shape[2]), gate[loose]
    return rows, row_gates


def by_kernels_backward(
    key: Tensor, gate: Tensor, grad: Tensor, grad_gates: Tensor, selection: Selection
) -> tuple[Tensor, Tensor]:
    """As `gathered_reference.gather_backward`; of keys in their dtype where they have the heads of gates."""
    from megatron_lighthouse.kernels.wall.gathered import gather_backward

    dk, dg = gather_backward(key, gate, grad, grad_gates, _windows(selection))
    if isinstance(selection.geometry, Packing):
        loose, at = _loose(selection.geometry)
        dk[loose], dg[loose] = grad[at].to(dk.dtype), grad_gates[at]
    return dk, dg


def _windows(selection: Selection) -> Windows:
    from megatron_lighthouse.kernels.wall.gathered import Windows

    pyramid, places = selection.geometry, selection.places
    if isinstance(pyramid, Packing):
        begin = pyramid.window_starts
    else:
        window = pyramid.window(pyramid.levels - 1)
        begin = torch.arange(0, pyramid.seq_length, window, dtype=torch.int32, device=places.device)
    return Windows(places, begin, pyramid.seq_length, selection.length, pyramid.levels, pyramid.pooling)


def _loose(packing: Packing) -> tuple[Tensor, Tensor]:
    """The tokens in no window, and their rows."""
    rows = Maps.of(packing).loose_row
    tokens = (rows >= 0).nonzero().squeeze(1)
    return tokens, rows[tokens]
