"""A block over documents: near and far rows are those of chunks of all documents, and a row sees its own document alone.

The rows of a chunk lie document by document (see `sequence.documents`), so those of several chunks are put in the documents'
order first. A document may have no row in a chunk: what sees nothing has an average of zero, and a log-sum-exp of minus
infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Block, Mask, Part, Tensors
from megatron_lighthouse.sequence.documents import Documents


@dataclass(frozen=True)
class OverDocuments:
    """`block`, document by document: see `Block`. Rows have B = 1."""

    block: Block
    documents: Documents
    ranks: int
    """C: chunks are numbered from 0 to 2C-1."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        nears, fars = self._split(near, mask.near), self._split(far, mask.far)
        parts = [self._forward(n, f, mask) for n, f in zip(nears, fars, strict=True) if len(n[0])]
        averages = (torch.cat(x) for x in zip(*(part.averages for part in parts), strict=True))
        back = self._order(mask.near).argsort()
        return Part(tuple(x[back] for x in averages), torch.cat([part.lse for part in parts], dim=2)[..., back])

    def output(self, part: Part) -> Tensor:
        return self.block.output(part)

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        count = len(near)
        nears = self._split((*near, grad, *part.averages, part.lse.movedim(2, 0)), mask.near)
        grads_near, grads_far = [], []
        for (*of_near, of_lse), of_far in zip(nears, self._split(far, mask.far), strict=True):
            own, given, averages = tuple(of_near[:count]), of_near[count], tuple(of_near[count + 1 :])
            if len(given) and len(of_far[0]):
                of_part = Part(averages, of_lse.movedim(0, 2))
                one_near, one_far = self.block.backward(given, own, of_far, of_part, mask)
            else:
                one_near, one_far = (tuple(torch.zeros_like(x) for x in rows) for rows in (own, of_far))
            grads_near.append(one_near)
            grads_far.append(one_far)
        return self._joined(grads_near, mask.near), self._joined(grads_far, mask.far)

    def _forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        if len(far[0]):
            return self.block.forward(near, far, mask)
        # one row in place of none gives the shapes and dtypes of what is then nothing
        part = self.block.forward(near, tuple(x.new_zeros(1, *x.shape[1:]) for x in far), Mask((1,), (0,)))
        return Part(tuple(torch.zeros_like(x) for x in part.averages), torch.full_like(part.lse, -torch.inf))

    def _order(self, chunks: tuple[int, ...]) -> Tensor:
        return self.documents.by_document(chunks, self.ranks)

    def _split(self, rows: Tensors, chunks: tuple[int, ...]) -> list[Tensors]:
        """Those of each document."""
        lengths, order = self.documents.lengths_of(chunks, self.ranks), self._order(chunks)
        return list(zip(*(x[order].split(lengths) for x in rows), strict=True))

    def _joined(self, grads: list[Tensors], chunks: tuple[int, ...]) -> Tensors:
        """`_split`, undone."""
        back = self._order(chunks).argsort()
        return tuple(torch.cat(x)[back] for x in zip(*grads, strict=True))
