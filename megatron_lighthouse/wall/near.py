"""The rows of Wall that stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Tensors
from megatron_lighthouse.wall.decay import spread


class Near(NamedTuple):
    """What stays, by rows, and its gradients."""

    query: Tensor
    """[n, B, H, K]."""
    key: Tensor
    value: Tensor
    gate: Tensor
    """[n, B, H or G, K], in the dtype of sums, as those below."""
    scalar: Tensor | None = None
    """[n, B, H, 1]."""
    sink: Tensor | None = None
    """[n, B, H, 1]: each row's own, so that its gradient is a row's."""

    @property
    def tensors(self) -> Tensors:
        return tuple(x for x in self if x is not None)

    def flat_scalar(self) -> Tensor | None:
        return None if self.scalar is None else self.scalar.squeeze(-1)

    def alike(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """For the diagonal: a gate for each query head, and as many values as keys, which in Lighthouse are as gates."""
        value, gate = spread(self.value, self.key.shape[2]), spread(self.gate, self.query.shape[2])
        return self.query, self.key, value, gate, self.flat_scalar()

    def rows(self, rows: slice) -> Near:
        """Some of them, as views."""
        return self.each(lambda x: x[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> Near:
        query, key, value, gate = (change(x) for x in self[:4])
        scalar, sink = (None if x is None else change(x) for x in self[4:])
        return Near(query, key, value, gate, scalar, sink)
