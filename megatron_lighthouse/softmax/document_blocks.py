"""A block over documents: near and far rows are those of chunks of all documents, and a row sees its own document alone.

The rows of a chunk lie document by document (see `sequence.documents`), so those of several chunks are put in the documents'
order first. A document may have no row in a chunk: what sees nothing has an average of zero, and a log-sum-exp of minus
infinity. Rows have B = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Block, Mask, Part, Tensors
from megatron_lighthouse.sequence.documents import Documents, InChunks
from megatron_lighthouse.softmax.base import Softmax

aten = torch.ops.aten


class Lengths(Protocol):
    """How rows lie: in runs, one of each document, end to end."""

    @property
    def lengths(self) -> tuple[int, ...]: ...

    @property
    def cu_seqlens(self) -> Tensor: ...

    @property
    def chunks(self) -> tuple[int, ...]:
        """Of near and far rows, who sees whom: see `Mask`."""


class Within(Protocol):
    """Attention within each document: as `Block`, of rows that lie document by document."""

    def forward(self, near: Tensors, far: Tensors, nears: Lengths, fars: Lengths) -> Part: ...

    def output(self, part: Part) -> Tensor: ...

    def backward(
        self, grad: Tensor, near: Tensors, far: Tensors, part: Part, nears: Lengths, fars: Lengths
    ) -> tuple[Tensors, Tensors]: ...


@dataclass(frozen=True)
class OverDocuments:
    """See `Block`: by `within`, of rows that lie chunk by chunk."""

    within: Within
    documents: Documents
    ranks: int
    """C: chunks are numbered from 0 to 2C-1."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        nears, fars = self._rows(mask.near), self._rows(mask.far)
        part = self.within.forward(_each(nears.in_documents, near), _each(fars.in_documents, far), nears, fars)
        return Part(_each(nears.in_order, part.averages), nears.in_order(part.lse, 2))

    def output(self, part: Part) -> Tensor:
        return self.within.output(part)

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        nears, fars = self._rows(mask.near), self._rows(mask.far)
        own = Part(_each(nears.in_documents, part.averages), nears.in_documents(part.lse, 2))
        rows = nears.in_documents(grad), _each(nears.in_documents, near), _each(fars.in_documents, far)
        of_near, of_far = self.within.backward(*rows, own, nears, fars)
        return _each(nears.in_order, of_near), _each(fars.in_order, of_far)

    def _rows(self, chunks: tuple[int, ...]) -> InChunks:
        return self.documents.in_chunks(chunks, self.ranks)


@dataclass(frozen=True)
class OneByOne:
    """By a block, document after document."""

    block: Block

    def forward(self, near: Tensors, far: Tensors, nears: Lengths, fars: Lengths) -> Part:
        mask = Mask(nears.chunks, fars.chunks)
        pairs = zip(_split(near, nears), _split(far, fars), strict=True)
        parts = [self._forward(n, f, mask) for n, f in pairs if len(n[0])]
        return Part(_joined([part.averages for part in parts]), torch.cat([part.lse for part in parts], dim=2))

    def output(self, part: Part) -> Tensor:
        return self.block.output(part)

    def backward(
        self, grad: Tensor, near: Tensors, far: Tensors, part: Part, nears: Lengths, fars: Lengths
    ) -> tuple[Tensors, Tensors]:
        mask, count, grads = Mask(nears.chunks, fars.chunks), len(near), []
        of_nears = _split((*near, grad, *part.averages, part.lse.movedim(2, 0)), nears)
        for (*of_near, of_lse), of_far in zip(of_nears, _split(far, fars), strict=True):
            own, given, averages = tuple(of_near[:count]), of_near[count], tuple(of_near[count + 1 :])
            if len(given) and len(of_far[0]):
                grads.append(self.block.backward(given, own, of_far, Part(averages, of_lse.movedim(0, 2)), mask))
            else:
                grads.append((_each(torch.zeros_like, own), _each(torch.zeros_like, of_far)))
        grads_near, grads_far = zip(*grads, strict=True)
        return _joined(grads_near), _joined(grads_far)

    def _forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        if len(far[0]):
            return self.block.forward(near, far, mask)
        # one row in place of none gives the shapes and dtypes of what is then nothing
        part = self.block.forward(near, tuple(x.new_zeros(1, *x.shape[1:]) for x in far), Mask((1,), (0,)))
        return Part(_each(torch.zeros_like, part.averages), torch.full_like(part.lse, -torch.inf))


class AllAtOnce(Softmax):
    """By FlashAttention 2 in torch, all documents in one call: near is the query, far key and value."""

    def forward(self, near: Tensors, far: Tensors, nears: Lengths, fars: Lengths) -> Part:
        q, k, v = (x.squeeze(1) for x in (*near, *far))
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *self._how(nears, fars), False, **self.flash_options)
        if any(n and not m for n, m in zip(nears.lengths, fars.lengths, strict=True)):
            lse.masked_fill_(lse.isposinf(), -torch.inf)  # what the kernel says where a row sees nothing
        return Part((out.unsqueeze(1),), lse.unsqueeze(0))

    def backward(
        self, grad: Tensor, near: Tensors, far: Tensors, part: Part, nears: Lengths, fars: Lengths
    ) -> tuple[Tensors, Tensors]:
        g, q, k, v, o = (x.squeeze(1) for x in (grad, *near, *far, *part.averages))
        none = torch.empty(2, dtype=torch.uint64, device=q.device)  # no dropout, so its seed and offset are not read
        given = (g.contiguous(), q, k, v, o.contiguous(), part.lse.squeeze(0).contiguous(), *self._how(nears, fars))
        dq, dk, dv = aten._flash_attention_backward(*given, none, none, **self.flash_options)
        return (dq.unsqueeze(1),), (dk.unsqueeze(1), dv.unsqueeze(1))

    @staticmethod
    def _how(nears: Lengths, fars: Lengths) -> tuple[Any, ...]:
        """Where documents begin, rows of the longest, no dropout, and whether rows are hidden."""
        # for queries of one row at most it would fold heads into rows, as if every document had one
        longest = max(2, *nears.lengths), max(fars.lengths)
        return nears.cu_seqlens, fars.cu_seqlens, *longest, 0.0, Mask(nears.chunks, fars.chunks).causal


def _each(way: Callable[[Tensor], Tensor], rows: Tensors) -> Tensors:
    return tuple(map(way, rows))


def _split(rows: Tensors, chunks: Lengths) -> list[Tensors]:
    """Those of each document."""
    return list(zip(*(x.split(chunks.lengths) for x in rows), strict=True))


def _joined(of_documents: Sequence[Tensors]) -> Tensors:
    """The way back."""
    return tuple(torch.cat(x) for x in zip(*of_documents, strict=True))
