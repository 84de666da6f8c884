"""Sums of gates outward from an anchor, along one dimension of rows, and their gradients.

Gates are natural logarithms <= 0: summed away from the anchor every partial sum has one sign, so that nothing that is small is
a difference of what is large, and no exponential overflows. Sums are made in float64, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_lighthouse.sums import accumulation_dtype
from megatron_lighthouse.wall import cut


class Decays(Protocol):
    """What the functions below and the kernels implement, each as a module.

    Rows are [n, B, heads, K], of any strides, in pieces of `step` rows, the last may be shorter: anchors lie between pieces.
    Gates [n, B, heads, K] and factors are in the dtype of sums, as are all sums. Where one argument has fewer heads than
    another, each of them serves several, in order.
    """

    def tile_sums(self, gate: Tensor, step: int) -> Tensor:
        """Sums of some rows at a time, [pieces, tiles of each, B, heads, K]; all tiles of a piece make the sum of its gates."""

    def decay(self, out: Tensor, x: Tensor, gate: Tensor, tile_sums: Tensor, after: bool, step: int, add: bool = False) -> None:
        """Write (or `add`) rows times exp(`prefix`) of their piece's gates, or (`after`) exp(`suffix`)."""

    def decay_backward(self, out: Tensor, x: Tensor, y: Tensor, after: bool, step: int) -> None:
        """Add the gates' gradient [n, B, heads, K] by way of x = decay(…), of which y is the gradient; or the other way round.

        Args:
            out: in the dtype of sums.
        """

    def cross(self, out: Tensor, key: Tensor, between: Tensor, step: int) -> Tensor:
        """Write keys [m, B, heads, K] times the factors [pieces, B, heads, K] of their piece, which it returns.

        Args:
            between: the sums of the gates of these pieces and of those after them, up to the anchor, [·, B, heads, K] float64:
                factors are exp(`suffix`) of these.
        """

    def cross_backward(
        self, out: Tensor, of_between: Tensor, crossed: Tensor, grad: Tensor, factors: Tensor, step: int
    ) -> None:
        """Add the gradients of keys [m, B, heads, K], in the dtype of sums, and of `between`.

        Args:
            crossed: what `cross` wrote.
            grad: its gradient.
        """

    def halves(self, query: Tensor, key: Tensor, gate: Tensor, tile_sums: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Of a chunk cut into pieces of `step` rows, by its `cut.halves` one after the other: the later halves' queries times
        exp(`prefix`) of their gates, [·, B, H, K], and the earlier ones' keys times exp(`suffix`), [·, B, heads of gates, K];
        contiguous.
        """

    def halves_backward(
        self,
        sums: Sequence[Tensor],
        grads: Sequence[Tensor],
        query: Tensor,
        key: Tensor,
        gate: Tensor,
        tile_sums: Tensor,
        step: int,
    ) -> None:
        """Add the gradients of the chunk's queries, keys, values and gates.

        Args:
            sums: of these, that of gates in the dtype of sums.
            grads: of what `halves` gave; and of the earlier halves' values, [·, B, G, V].
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
    return x.unflatten(2, (heads, -1)).sum(3, dtype=accumulation_dtype(x)).to(x.dtype)


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


def between_backward(of_between: Tensor, grad: Tensor) -> None:
    """Add the gradient by way of `suffix` of the first of its rows."""
    of_between += suffix_backward(torch.cat([grad, grad.new_zeros(len(of_between) - len(grad), *grad.shape[1:])]))


def sums(gate: Tensor, step: int) -> Tensor:
    """Of each piece of so many rows, [pieces, ...], float64."""
    return torch.stack([part.sum(0, dtype=torch.float64) for part in gate.split(step)])


def tile_sums(gate: Tensor, step: int) -> Tensor:
    """See `Decays`, as for all below."""
    return sums(gate, step).unsqueeze(1)


def decay(out: Tensor, x: Tensor, gate: Tensor, tile_sums: Tensor, after: bool, step: int, add: bool = False) -> None:
    heads = out.shape[2]
    factor = torch.cat([(suffix if after else prefix)(part) for part in gate.split(step)]).exp()
    found = spread(x, heads) * spread(factor, heads)
    out.copy_(out + found if add else found)


def decay_backward(out: Tensor, x: Tensor, y: Tensor, after: bool, step: int) -> None:
    product = summed(spread(x, y.shape[2]).to(out.dtype) * y, out.shape[2])
    out += torch.cat([(suffix_backward if after else prefix_backward)(part) for part in product.split(step)])


def cross(out: Tensor, key: Tensor, between: Tensor, step: int) -> Tensor:
    factors = suffix(between)[: -(-len(key) // step)].exp().to(accumulation_dtype(key))
    for i, factor in enumerate(factors):
        rows = slice(i * step, (i + 1) * step)
        out[rows] = key[rows] * factor
    return factors


def cross_backward(out: Tensor, of_between: Tensor, crossed: Tensor, grad: Tensor, factors: Tensor, step: int) -> None:
    for i, factor in enumerate(factors):
        rows = slice(i * step, (i + 1) * step)
        out[rows] += grad[rows] * factor
    between_backward(of_between, sums(crossed.to(out.dtype) * grad, step))


def halves(query: Tensor, key: Tensor, gate: Tensor, tile_sums: Tensor, step: int) -> tuple[Tensor, Tensor]:
    near, far = [], []
    for half, anchor, end in cut.halves(len(query), step):
        later, earlier = slice(anchor, end), slice(anchor - half, anchor)
        near.append(query[later] * spread(prefix(gate[later]).exp(), query.shape[2]))
        far.append(spread(key[earlier], gate.shape[2]) * suffix(gate[earlier]).exp())
    return joined(near).to(query.dtype).contiguous(), joined(far).to(key.dtype).contiguous()


def halves_backward(
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    gate: Tensor,
    tile_sums: Tensor,
    step: int,
) -> None:
    dq, dk, dv = (x.to(gate.dtype) for x in sums[:3])
    near = far = 0
    for half, anchor, end in cut.halves(len(query), step):
        later, earlier = slice(anchor, end), slice(anchor - half, anchor)
        of_query = spread(prefix(gate[later]).exp(), query.shape[2]) * grads[0][near : near + end - anchor]
        of_key, of_value = (x[far : far + half] for x in grads[1:])
        of_key = suffix(gate[earlier]).exp() * of_key
        dq[later] += of_query
        dk[earlier] += summed(of_key, key.shape[2])
        dv[earlier] += of_value
        sums[3][later] += prefix_backward(summed(query[later] * of_query, gate.shape[2]))
        sums[3][earlier] += suffix_backward(spread(key[earlier], gate.shape[2]) * of_key)
        near, far = near + end - anchor, far + half
    for total, x in zip(sums, (dq, dk, dv), strict=False):
        total.copy_(x)
