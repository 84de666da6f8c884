"""Pieces of a sequence, each with an anchor before and after it. Imports no torch, for the plan counts by them too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

TOTALS = "totals"
"""What is sent besides rows: the sums of each piece."""


class Step:
    """How long pieces are."""

    TOKENS: ClassVar = 4096
    """Tokens of a piece that travels, and of one along the diagonal where documents end anywhere."""
    SHORTER: ClassVar = 4
    """How many times shorter a piece along the diagonal is elsewhere. There Wall has kernels of its own, which take longer for
    a pair of tokens than those of softmax attention; these are called once for all anchors that lie alike."""

    @classmethod
    def along(cls, alike: bool) -> int:
        """Tokens of a piece along the diagonal. `alike`: whether anchors lie alike."""
        return -(-cls.TOKENS // cls.SHORTER) if alike else cls.TOKENS


class Halves(NamedTuple):
    """Neighbouring halves of a block of rows: the later sees the earlier by way of the anchor between them."""

    half: int
    """Rows of the earlier."""
    anchor: int
    """The later's first row."""
    end: int
    """The row after its last; it may be shorter."""


def halves(rows: int, step: int) -> Iterator[Halves]:
    """Those of blocks of 2, 4, 8 … pieces of `step` rows, the smallest blocks first: any two pieces meet in one of them."""
    half = step
    while half < rows:
        for anchor in range(half, rows, 2 * half):
            yield Halves(half, anchor, min(anchor + half, rows))
        half *= 2


@lru_cache(64)
def rows_of_halves(rows: int, step: int) -> tuple[int, int]:
    """Of all later ones together, and of all earlier ones."""
    found = list(halves(rows, step))
    return sum(end - anchor for _, anchor, end in found), sum(half for half, *_ in found)


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
