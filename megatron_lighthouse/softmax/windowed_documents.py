"""Attention within documents that is more than a causal softmax over all of each: with a window, with sinks, or both.

By parts with their log-sum-exp (`softmax.document_blocks`), by which sinks enter. Over ranks the halo of windows comes straight
from those that hold it, in one message for all documents, whatever the scheme.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lighthouse.context_parallel.alone import Alone
from megatron_lighthouse.context_parallel.document_windows import Runs, Windows
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.parts import Mask, Part, Tensors
from megatron_lighthouse.context_parallel.transfer import Transfer
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.softmax.backends import choose_for_blocks
from megatron_lighthouse.softmax.blocks import BLOCKS
from megatron_lighthouse.softmax.document_blocks import AllAtOnce, OneByOne, Within
from megatron_lighthouse.softmax.names import OVER_SHARDED_DOCUMENTS
from megatron_lighthouse.softmax.rows import RowKind


@dataclass(frozen=True)
class OverRuns:
    """See `Block`: of rows that lie run by run, of which near ones are the last of the far ones."""

    within: Within
    near: Runs
    far: Runs

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        return self.within.forward(near, far, self.near, self.far)

    def output(self, part: Part) -> Tensor:
        return self.within.output(part)

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        return self.within.backward(grad, near, far, part, self.near, self.far)


@dataclass(frozen=True)
class DocumentsAlone:
    """An `AttendDocuments` of one rank, with the window of `within`; and with sinks, where a call brings them."""

    within: Within

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, sinks: Tensor | None = None) -> Tensor:
        runs = Runs.of(documents)
        return Alone(OverRuns(self.within, runs, runs))((query,), (key, value), sinks)


@dataclass(frozen=True)
class WindowedDocuments:
    """The same of the tokens that a rank holds, which see `before` tokens before them."""

    within: Within
    exchange: Exchange
    before: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, sinks: Tensor | None = None) -> Tensor:
        if problem := documents.zigzag_problem(self.exchange.size):
            raise ValueError(problem)
        windows = Windows.of(documents, self.exchange.layout, self.before)
        far = Transfer(self.exchange, "attend", windows.way)(key, value)
        return Alone(OverRuns(self.within, windows.near, windows.far))((query,), far, sinks)


def within_documents(
    name: str,
    query: Tensor,
    key: Tensor,
    scale: float,
    value_dim: int | None,
    window: int | None,
    over: str,
) -> Within:
    """Attention over rows document by document, by the backend `name` or, for 'auto', the fastest.

    Args:
        query: [·, 1, H, D]; key: [·, 1, G, D]; of these only heads, D, dtype and device count.
        value_dim: of the values, where it is not D.
        window: rows before its own that a row sees; None: all.
        over: what it attends over, in words.

    Raises:
        ValueError: a backend that is forced and cannot do it.
    """
    chosen = choose_for_blocks(name, OVER_SHARDED_DOCUMENTS, RowKind.of(query, key, value_dim), over)
    return AllAtOnce(scale, window) if chosen == "fa2" else OneByOne(BLOCKS[chosen](scale, window))
