"""Sums of gates outward from an anchor, along one dimension of rows, and their gradients.

Gates are natural logarithms <= 0: summed away from the anchor every partial sum has one sign, so that nothing that is small is
a difference of what is large, and no exponential overflows. Sums are made in float64, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spread(x: Tensor, heads: int) -> Tensor:
    """[n, B, G, ·] -> [n, B, heads, ·]: each of G heads for as many of `heads`, in order; as it is where these are as many."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


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
