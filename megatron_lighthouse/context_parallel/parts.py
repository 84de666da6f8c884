"""Parts: attention of rows that stay (near) to rows that travel (far), and how attention over more rows is made of several.

A scheme moves tuples of tensors and says by a mask where in the sequence they come from; what they are, only a block knows. All
tensors begin with a dimension of rows: [n, B, heads, ·].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.merge import merge

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Mask:
    """The chunks of the sequence, of 2C, that the near and the far rows are: who sees whom follows from it.

    Either they are the same, and a row sees those up to its own; or all far ones come before all near ones, and are seen.
    """

    near: tuple[int, ...]
    far: tuple[int, ...]

    @property
    def causal(self) -> bool:
        """Whether rows are hidden at all."""
        return self.near == self.far


@dataclass
class Part:
    """Attention over some of the keys: what can be merged with that over others."""

    averages: Tensors
    """[n, B, H, ·] each, over the keys, weighted by the softmax over these keys."""
    lse: Tensor
    """[B, H, n], the log-sum-exp of their logits, natural logarithm: fp32 (fp64 for fp64)."""

    def __getitem__(self, rows: slice) -> Self:
        """That of some of the near rows, as views."""
        return type(self)(tuple([x[rows] for x in self.averages]), self.lse[..., rows])

    def to(self, *dtypes: torch.dtype) -> Self:
        return type(self)(tuple([x.to(dtype) for x, dtype in zip(self.averages, dtypes, strict=True)]), self.lse)

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [x.dtype for x in self.averages]

    def merge(self, other: Part) -> None:
        """Make it the attention over the keys of both, in place."""
        for x, y in zip(self.averages[:-1], other.averages[:-1], strict=True):
            merge(x, self.lse.clone(), y, other.lse)
        merge(self.averages[-1], self.lse, other.averages[-1], other.lse)

    def with_sinks(self, sinks: Tensor | None) -> Part:
        """That where each row also sees a key whose value is 0 and whose logit is its head's of `sinks` [H]: once, at the end.

        out * sigmoid(lse - sink), and log(e^lse + e^sink). Given this part, `Block.backward` is that of the rest of the keys.
        """
        if sinks is None:
            return self
        lse = torch.logaddexp(self.lse, sinks.to(self.lse.dtype).unsqueeze(-1))
        share = (self.lse - lse).exp().permute(2, 0, 1).unsqueeze(-1)
        return Part(tuple((x * share).to(x.dtype) for x in self.averages), lse)


def saved_in(tensors: Sequence[Tensor], near: int, far: int) -> tuple[Tensors, Tensors, Part]:
    """Near rows, far rows and the part over all of them, from `near` + `far` tensors, the averages and the log-sum-exp."""
    *rows, lse = tensors
    return tuple(rows[:near]), tuple(rows[near : near + far]), Part(tuple(rows[near + far :]), lse)


def sinks_gradient(sinks: Tensor | None, grad: Tensor, output: Tensor, lse: Tensor) -> Tensor | None:
    """[H]: of the sinks, -sum over rows of e^(sink - lse) (grad · output).

    Args:
        grad: [n, B, H, D], of `output`; both and `lse` [B, H, n] are of `Part.with_sinks`.
    """
    if sinks is None:
        return None
    shares = (sinks.to(lse.dtype).unsqueeze(-1) - lse).exp()
    changes = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1).permute(1, 2, 0)
    return -(shares * changes).sum((0, 2)).to(sinks.dtype)


class Block(Protocol):
    """One kind of attention, as the schemes call it."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        """The part of these far rows."""

    def output(self, part: Part) -> Tensor:
        """[n, B, H, D], from the part of all far rows."""

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        """The gradients of near and far rows by way of each other.

        Args:
            grad: of the output of the near rows.
            part: of the near rows over *all* far rows.
        """


class Scheme(Protocol):
    """How the near rows of all ranks meet the far rows of all."""

    def __call__(self, near: Tensors, far: Tensors, sinks: Tensor | None = None) -> Tensor:
        """The output of this rank's near rows [2s, ...] over the far rows of all ranks, and sinks; differentiable."""
