"""Pieces of a sequence, each with an anchor before and after it. Imports no torch, for the plan counts by them too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

TOTALS = "totals"
"""What is sent besides rows: the sums of each piece."""


class Step:
    """How long pieces are."""

    TOKENS: ClassVar = 4096
    """Tokens of a piece: along the diagonal of one Wall has kernels of its own, beyond it those of softmax attention."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens, of which a tensor holds the rows."""

    number: int
    """Of the whole sequence's, in order."""
    begin: int
    """Its first token in the sequence."""
    rows: slice
    """Of the tensor."""

    @property
    def end(self) -> int:
        """The token after its last."""
        return self.begin + self.rows.stop - self.rows.start

    def since(self, token: int) -> Piece:
        """What of it does not come before this token."""
        skipped = max(token - self.begin, 0)
        return Piece(self.number, self.begin + skipped, slice(self.rows.start + skipped, self.rows.stop))


@dataclass(frozen=True)
class Cut:
    """How a sequence is cut: into chunks for the ranks, and these into pieces of `step` tokens, the last may be shorter."""

    chunk: int
    """Tokens of a chunk."""
    step: int

    @property
    def per_chunk(self) -> int:
        return -(-self.chunk // self.step)

    def pieces(self, chunks: Sequence[int]) -> list[Piece]:
        """Those of tensors that hold these chunks, one after the other."""
        found = []
        for i, chunk in enumerate(chunks):
            for j in range(self.per_chunk):
                begin, end = j * self.step, min((j + 1) * self.step, self.chunk)
                rows = slice(i * self.chunk + begin, i * self.chunk + end)
                found.append(Piece(chunk * self.per_chunk + j, chunk * self.chunk + begin, rows))
        return found

    def whole(self, chunks: Sequence[int]) -> list[Piece]:
        """These chunks, each as one piece that bears the number of its first."""
        starts = [slice(i * self.chunk, (i + 1) * self.chunk) for i in range(len(chunks))]
        return [Piece(chunk * self.per_chunk, chunk * self.chunk, rows) for chunk, rows in zip(chunks, starts, strict=True)]
