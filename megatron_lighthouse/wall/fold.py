"""A level of the pyramid of decayed keys from the one below: p parts become one, each decayed to the end of the last.

    X = Σ_c x_c exp(Σ_{c<c'} G_c')        G = Σ_c G_c

of parts c with the sums x of their keys and G of their gates; at first these are tokens. The exponents are sums outward from
the window's end, none positive.
"""

from __future__ import annotations

from torch import Tensor

from megatron_lighthouse.gpu import triton_takes
from megatron_lighthouse.wall.decay import spread, suffix, suffix_backward


def fold(x: Tensor, gate: Tensor, pooling: int) -> tuple[Tensor, Tensor]:
    """[n, B, G, K] and gates [n, B, heads, K], in the dtype of sums, to two of [n/p, B, heads, K] in that."""
    if triton_takes(gate):
        from megatron_lighthouse.kernels.wall.fold import fold as kernel

        return kernel(x, gate, pooling)
    parts = gate.unflatten(0, (-1, pooling))
    wide = spread(x.to(gate.dtype), gate.shape[2]).unflatten(0, (-1, pooling))
    return (wide * suffix(parts, 1).exp()).sum(1), parts.sum(1)


def fold_backward(x: Tensor, gate: Tensor, d_sums: Tensor, d_totals: Tensor, pooling: int) -> tuple[Tensor, Tensor]:
    """Of `x`, for each of the gates' heads in their dtype, and of the gates, for the gradients of what `fold` gives."""
    if triton_takes(gate):
        from megatron_lighthouse.kernels.wall.fold import fold_backward as kernel

        return kernel(x, gate, d_sums, d_totals, pooling)
    parts = gate.unflatten(0, (-1, pooling))
    wide = spread(x.to(gate.dtype), gate.shape[2]).unflatten(0, (-1, pooling))
    dx = d_sums.unsqueeze(1) * suffix(parts, 1).exp()
    d_gate = d_totals.unsqueeze(1) + suffix_backward(wide * dx, 1)
    return dx.flatten(0, 1), d_gate.flatten(0, 1)
