"""Documents: a row of tokens that holds several texts, each of which is to be as if it were alone; and who holds their tokens.

Document zigzag (ours): of C context-parallel ranks each document is cut into 2C chunks, and rank r holds chunks r and 2C-1-r of
every document, as the zigzag of one sequence. No length need divide by 2C. Chunk c of the document from token a to token b has

    (b + c) // 2C - (a + c) // 2C

tokens: their sum over c is b - a (Hermite's identity), no two of them differ by more than one, and chunks c of all documents
have t / 2C together. So all ranks hold as many tokens, and none is padded; where 2C divides all lengths, all chunks of a
document are equal. A rank holds its early chunks of all documents, one after the other, then its late ones: to the schemes that
pass chunks around, as one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from megatron_lighthouse.sequence.layout import Layout

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""(version, documents), by boundaries that somebody still holds."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one row of tokens, end to end."""

    cu_seqlens: Tensor
    """[n + 1], int32, contiguous, as kernels take it: where each begins, and where the last ends."""
    lengths: tuple[int, ...]
    """In tokens, as the host knows them."""

    @staticmethod
    def of(cu_seqlens: Tensor, tokens: int, device: torch.device | None = None, most: int | None = None) -> Documents:
        """Those of a row, whose boundaries the host reads once.

        Raises:
            ValueError: as `check_cu_seqlens`.
        """
        lengths = check_cu_seqlens(cu_seqlens, tokens, device, most)
        return Documents(cu_seqlens.contiguous(), lengths)

    @staticmethod
    def known(cu_seqlens: Tensor, tokens: int, device: torch.device) -> Documents:
        """As `of`; made once for a tensor that is not written to in between, so that the host reads it once for all layers."""
        if torch.compiler.is_compiling() or cu_seqlens.is_inference():  # which know no version of a tensor
            return Documents.of(cu_seqlens, tokens, device)
        version, found = _known.get(cu_seqlens, (-1, None))
        if found is None or (version, found.tokens, found.cu_seqlens.device) != (cu_seqlens._version, tokens, device):
            found = Documents.of(cu_seqlens.detach(), tokens, device)  # another tensor, or it would keep itself alive
            _known[cu_seqlens] = cu_seqlens._version, found
        return found

    @property
    def tokens(self) -> int:
        """t, of all of them."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)

    @cached_property
    def positions(self) -> Tensor:
        """[t], int64: the place of each token of the row in its document, from 0."""
        bounds = self.cu_seqlens.long()
        return runs(torch.zeros_like(bounds[1:]), bounds, self.tokens)

    def long_alone(self, long: int) -> list[Documents]:
        """The row in parts, end to end: each document of `long` tokens or more alone, all between two of them together; made
        once for all layers."""
        made: dict[int, list[Documents]] = vars(self).setdefault("parts", {})
        if long not in made:
            ends = [i + end for i, length in enumerate(self.lengths) if length >= long for end in (0, 1)]
            bounds = sorted({0, *ends, len(self.lengths)})
            made[long] = [self if b - a == len(self.lengths) else self._some(a, b) for a, b in pairwise(bounds)]
        return made[long]

    def _some(self, first: int, last: int) -> Documents:
        return Documents(self.cu_seqlens[first : last + 1] - self.cu_seqlens[first], self.lengths[first:last])

    def cu_seqlens_of(self, chunk: int, ranks: int) -> Tensor:
        """[n + 1], int32: the boundaries of all documents' chunks of this number, of 2 * ranks, laid end to end."""
        return chunk_bounds(self.cu_seqlens, chunk, ranks)

    def chunk_sizes(self, ranks: int) -> Tensor:
        """[2 * ranks, n], int64: tokens of each chunk of each document."""
        made: dict[int, Tensor] = vars(self).setdefault("chunked", {})
        if ranks not in made:
            chunks = torch.arange(2 * ranks, device=self.cu_seqlens.device).unsqueeze(1)
            made[ranks] = ((self.cu_seqlens.long() + chunks) // (2 * ranks)).diff(dim=1)
        return made[ranks]

    def rows_of(self, chunk: int, ranks: int) -> Tensor:
        """[t / (2 * ranks)], int64: the tokens of the row that all documents' chunks of this number are."""
        own, rows = self.cu_seqlens_of(chunk, ranks).long(), self.tokens // (2 * ranks)
        begins = self.cu_seqlens[:-1] + self.chunk_sizes(ranks)[:chunk].sum(0)
        return runs(begins, own, rows)

    def rows_of_rank(self, layout: Layout) -> Tensor:
        """[t / C], int64: the tokens of the row that a rank holds, in the order in which it holds them; one alone, as they are.

        Raises:
            ValueError: a row that 2C does not divide.
        """
        if problem := self.zigzag_problem(layout.size):
            raise ValueError(problem)
        if layout.size == 1:
            return torch.arange(self.tokens, device=self.cu_seqlens.device)
        return torch.cat([self.rows_of(chunk, layout.size) for chunk in layout.chunks])

    def in_chunks(self, chunks: Sequence[int], ranks: int) -> InChunks:
        """The rows of these of the documents' 2 * ranks chunks; made once for all layers."""
        made: dict[tuple[tuple[int, ...], int], InChunks] = vars(self).setdefault("chunk_rows", {})
        key = tuple(chunks), ranks
        if key not in made:
            made[key] = InChunks(self.cu_seqlens, self.lengths, *key)
        return made[key]

    def zigzag_problem(self, ranks: int) -> str | None:
        """Why so many ranks cannot hold the row; None where they can."""
        if ranks == 1 or self.tokens % (2 * ranks) == 0:
            return None
        return (
            f"cu_seqlens ends at {self.tokens} tokens, which {ranks} context-parallel ranks cannot share: make it a multiple "
            f"of {2 * ranks} (single documents need not be), such as {-(-self.tokens // (2 * ranks)) * 2 * ranks}."
        )


@dataclass(frozen=True, eq=False)
class InChunks:
    """The rows of some chunks of all documents: chunk by chunk, as ranks hold them, or document by document."""

    of_documents: Tensor
    """The documents' `cu_seqlens`."""
    whole: tuple[int, ...]
    """The documents' lengths."""
    chunks: tuple[int, ...]
    ranks: int

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each document, as the host knows them."""
        bounds = numpy.cumsum((0, *self.whole))
        return tuple(numpy.diff(sum((bounds + chunk) // (2 * self.ranks) for chunk in self.chunks)).tolist())

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[n + 1], int32: the rows before each document, and after the last."""
        bounds = [chunk_bounds(self.of_documents, chunk, self.ranks) for chunk in self.chunks]
        return torch.stack(bounds).sum(0, dtype=torch.int32)

    @cached_property
    def by_document(self) -> Tensor:
        """[rows], int64: which row, of those chunk by chunk, is the next of those document by document."""
        bounds = torch.stack([chunk_bounds(self.of_documents, chunk, self.ranks).long() for chunk in self.chunks], dim=1)
        rows = sum(self.whole) // (2 * self.ranks)
        begins = bounds[:-1] + rows * torch.arange(len(self.chunks), device=bounds.device)
        ends = torch.cat([bounds.new_zeros(1), bounds.diff(dim=0).flatten().cumsum(0)])
        return runs(begins.flatten(), ends, rows * len(self.chunks))

    @cached_property
    def by_chunk(self) -> Tensor:
        """[rows], int64: the way back. Of all chunks: the tokens of the row, first all documents' chunks 0."""
        there = self.by_document
        return torch.empty_like(there).scatter_(0, there, torch.arange(len(there), device=there.device))

    def in_documents(self, x: Tensor, dim: int = 0) -> Tensor:
        """Rows along `dim`, chunk by chunk, as document by document."""
        return x if len(self.chunks) == 1 else x.index_select(dim, self.by_document)

    def in_order(self, x: Tensor, dim: int = 0) -> Tensor:
        """The way back."""
        return x if len(self.chunks) == 1 else x.index_select(dim, self.by_chunk)


def chunk_bounds(cu_seqlens: Tensor, chunk: int, ranks: int) -> Tensor:
    """See `Documents.cu_seqlens_of`."""
    return (cu_seqlens + chunk) // (2 * ranks)


def check_cu_seqlens(
    cu_seqlens: Tensor, tokens: int, device: torch.device | None = None, most: int | None = None
) -> tuple[int, ...]:
    """The documents' lengths, of boundaries that keep the rules.

    Args:
        tokens: t, of the row.
        device: where the row is; None: anywhere.
        most: documents that a row may have; None: any number.

    Raises:
        ValueError: the rule that is broken, and what would keep it.
    """
    shape = tuple(cu_seqlens.shape)
    if cu_seqlens.dtype != torch.int32 or len(shape) != 1:
        raise ValueError(
            f"cu_seqlens must be int32 [documents + 1], got {cu_seqlens.dtype} {shape}: give one row's, as cu_seqlens.int()."
        )
    if device is not None and cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens must be where the tokens are, {device}, got {cu_seqlens.device}: move it there.")
    bounds: list[int] = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0 and have an entry for each document's end, got {_short(bounds)}.")
    lengths = tuple(end - start for start, end in pairwise(bounds))
    if min(lengths) < 1:
        end = 1 + next(i for i, length in enumerate(lengths) if length < 1)
        raise ValueError(
            f"cu_seqlens must increase, and entry {end} is {bounds[end]} after {bounds[end - 1]}: leave out documents without "
            "tokens, and entries that only fill up."
        )
    if bounds[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must end at the row's {tokens} tokens, got {bounds[-1]}: let the last document end there."
        )
    if most is not None and len(lengths) > most:
        raise ValueError(f"cu_seqlens has {len(lengths)} documents, and a row may have {most}: raise the bound, or pack fewer.")
    return lengths


def runs(begins: Tensor, bounds: Tensor, length: int) -> Tensor:
    """[length] int64: for the places from bounds i to i + 1 the number begins i and those after it; asks the device nothing.

    Args:
        begins: [n] int64; bounds: [n + 1] int64, from 0 to `length`.
    """
    return repeated(begins - bounds[:-1], bounds.diff(), length).add_(torch.arange(length, device=bounds.device))


def repeated(values: Tensor, counts: Tensor, length: int) -> Tensor:
    """[length]: each value so many times; asks the device nothing. On the CPU numpy takes a quarter of torch's time."""
    if values.is_cpu:
        return torch.from_numpy(numpy.repeat(values.numpy(), counts.numpy()))
    return values.repeat_interleave(counts, output_size=length)


def _short(bounds: list[int]) -> str:
    return str(bounds) if len(bounds) < 8 else f"[{', '.join(map(str, bounds[:6]))}, … {bounds[-1]}]"
