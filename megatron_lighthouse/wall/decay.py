"""Sums of gates outward from an anchor, along one dimension of rows, and their gradients.

Gates are natural logarithms <= 0: summed away from the anchor every partial sum has one sign, so that nothing that is small is
a difference of what is large, and no exponential overflows. Sums are made in float64, and rounded once.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Decays(Protocol):
    """What the functions below and the kernels implement, each as a module.

    Rows are [n, B, heads, K], of any strides, in pieces of `step` rows, the last may be shorter: anchors lie between pieces.
    Gates [n, B, heads, K] and factors are in the dtype of sums, as are all sums. Where one argument has fewer heads than
    another, each of them serves several, in order.
    """

    def decay(self, x: Tensor, gate: Tensor, after: bool, step: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows times exp(`prefix`) of their piece's gates, or (`after`) exp(`suffix`); in `dtype`, by default that of `x`."""

    def add_decayed(self, out: Tensor, x: Tensor, gate: Tensor, after: bool, step: int) -> None:
        """Add that to rows in the dtype of sums."""

    def decay_backward(self, x: Tensor, y: Tensor, heads: int, after: bool, step: int) -> Tensor:
        """The gates' gradient [n, B, heads, K] by way of x = decay(…), of which y is the gradient; or the other way round."""

    def sums(self, gate: Tensor, step: int) -> Tensor:
        """Of each piece [pieces, B, heads, K], float64."""

    def cross(self, out: Tensor, key: Tensor, factors: Tensor, step: int) -> None:
        """Write keys [m, B, heads, K] times the factors [pieces, B, heads, K] of their piece."""

    def cross_backward(self, out: Tensor, crossed: Tensor, grad: Tensor, factors: Tensor, step: int) -> Tensor:
        """Add the keys' gradients [m, B, heads, K] in the dtype of sums.

        Args:
            crossed: what `cross` wrote.
            grad: its gradient.

        Returns:
            The gradient of the factors' logarithms, [pieces, B, heads, K], float64.
        """


def spread(x: Tensor, heads: int) -> Tensor:
    """[n, B, G, ·] -> [n, B, heads, ·]: each of G heads for as many of `heads`, in order; as it is where these are as many."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def joined(parts: list[Tensor]) -> Tensor:
    """Rows one after the other; one part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def summed(x: Tensor, heads: int) -> Tensor:
    """The way back: [n, B, ·, ·] -> [n, B, heads, ·], summed over those that share one of `heads`, in the dtype of sums."""
    if x.shape[2] == heads:
        return x
    return x.unflatten(2, (heads, -1)).sum(3, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def prefix(gate: Tensor, dim: int = 0) -> Tensor:
    """Σ_{t<=i}: from the anchor before the first row up to each row's own gate."""
    return gate.cumsum(dim, dtype=torch.float64).to(gate.dtype)


def suffix(gate: Tensor, dim: int = 0) -> Tensor:
    """Σ_{t>j}: from each row's next gate up to the anchor after the last row."""
    after = torch.cat([gate.narrow(dim, 1, gate.shape[dim] - 1), torch.zeros_like(gate.narrow(dim, 0, 1))], dim)
    return after.flip(dim).cumsum(dim, dtype=torch.float64).flip(dim).to(gate.dtype)


def prefix_backward(grad: Tensor, dim: int = 0) -> Tensor:
    """The gradient of the gates by way of `prefix`: Σ_{i>=t}. Exactly 0 where only zeros follow."""
    return grad.flip(dim).cumsum(dim, dtype=torch.float64).flip(dim).to(grad.dtype)


def suffix_backward(grad: Tensor, dim: int = 0) -> Tensor:
    """The gradient of the gates by way of `suffix`: Σ_{j<t}. Exactly 0 where only zeros come before."""
    before = torch.cat([torch.zeros_like(grad.narrow(dim, 0, 1)), grad.narrow(dim, 0, grad.shape[dim] - 1)], dim)
    return before.cumsum(dim, dtype=torch.float64).to(grad.dtype)


def decay(x: Tensor, gate: Tensor, after: bool, step: int, dtype: torch.dtype | None = None) -> Tensor:
    """See `Decays`, as for all below."""
    heads = max(x.shape[2], gate.shape[2])
    factor = torch.cat([(suffix if after else prefix)(part) for part in gate.split(step)]).exp()
    return (spread(x, heads) * spread(factor, heads)).to(dtype or x.dtype)


def add_decayed(out: Tensor, x: Tensor, gate: Tensor, after: bool, step: int) -> None:
    out += decay(x, gate, after, step, out.dtype)


def decay_backward(x: Tensor, y: Tensor, heads: int, after: bool, step: int) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    product = summed(spread(x, y.shape[2]).to(wide) * y, heads)
    return torch.cat([(suffix_backward if after else prefix_backward)(part) for part in product.split(step)])


def sums(gate: Tensor, step: int) -> Tensor:
    return torch.stack([part.sum(0, dtype=torch.float64) for part in gate.split(step)])


def cross(out: Tensor, key: Tensor, factors: Tensor, step: int) -> None:
    for i, factor in enumerate(factors):
        rows = slice(i * step, (i + 1) * step)
        out[rows] = key[rows] * factor


def cross_backward(out: Tensor, crossed: Tensor, grad: Tensor, factors: Tensor, step: int) -> Tensor:
    for i, factor in enumerate(factors):
        rows = slice(i * step, (i + 1) * step)
        out[rows] += grad[rows] * factor
    return sums(crossed.to(out.dtype) * grad, step)
