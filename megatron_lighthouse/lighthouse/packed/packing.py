"""A row of packed documents: which of its tokens form windows, and the rows that each document becomes.

The windows of all documents, one after the other, are those of one sequence of W*F tokens: the row without its loose tokens,
which are the documents' tails and whole documents. So levels 1..L-1 are numbered as in that sequence's pyramid (`compact`), and
level 0 is the row itself. No window holds tokens of two documents, no tile has windows of two, and no spill is followed into
the next. Rows stand document by document, each one's in causal order, its tail last.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.packed.rule import Rule
from megatron_lighthouse.sequence.documents import Documents, repeated, runs


@dataclass(frozen=True)
class Packing(Pyramid):
    """The entries of a row of documents. `seq_length` is t, its tokens; in level 0 are all of them, in others the windows."""

    rule: Rule
    lengths: tuple[int, ...]
    """Of the documents, in tokens."""
    cu_seqlens: Tensor = field(compare=False, repr=False)
    """[n + 1] int32: where the documents begin, and where the last ends."""

    @staticmethod
    def of(documents: Documents, rule: Rule) -> Packing:
        """That of a row; made once for all layers that share a rule."""
        made: dict[Rule, Packing] = vars(documents).setdefault("packings", {})
        if rule not in made:
            lengths = documents.lengths
            made[rule] = Packing(sum(lengths), rule.levels, rule.pooling, rule, lengths, documents.cu_seqlens)
        return made[rule]

    def entries(self, level: int) -> int:
        """Entries of `level`: tokens, or whole windows."""
        return self.compact.entries(level) if level else self.seq_length

    @cached_property
    def compact(self) -> Pyramid:
        """That of the tokens in windows."""
        return Pyramid(sum(self.windows) * self.rule.window, self.levels, self.pooling)

    @cached_property
    def on_cpu(self) -> Packing:
        """The same on the CPU."""
        if self.cu_seqlens.device.type == "cpu":
            return self
        here = replace(self, cu_seqlens=bounds_of(integers(self.lengths)))
        vars(here)["counts"] = self.counts
        return here

    @cached_property
    def counts(self) -> Tensor:
        """[5, n] int64, on the CPU: `Rule.counts` of each document. A row of t tokens has at most sqrt(2t) lengths."""
        distinct, which = integers(self.lengths).unique(return_inverse=True)
        found = map(self.rule.counts, distinct.tolist())
        return integers([(*counts, *last) for *counts, last in found]).t()[:, which]

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """Coarsest windows of each document; 0 where it is whole."""
        return tuple(self.counts[0].tolist())

    def compact_documents(self, unit: int) -> Documents:
        """What the documents have of the compact sequence, a row for every `unit` tokens of it; whole ones have none."""
        made: dict[int, Documents] = vars(self).setdefault("compacted", {})
        if unit not in made:
            each = self.rule.window // unit
            made[unit] = Documents(self.bounds[1] * each, tuple(windows * each for windows in self.windows))
        return made[unit]

    @property
    def is_whole(self) -> bool:
        """Whether every document is: then rows are tokens."""
        return not any(self.windows)

    @cached_property
    def rows(self) -> Documents:
        """The gathered rows of each document, as documents."""
        return Documents(self.bounds[2], tuple(self.counts[1].tolist()))

    @cached_property
    def gathered_length(self) -> int:
        """S, rows of all documents together."""
        return int(self.counts[1].sum())

    @cached_property
    def bounds(self) -> Tensor:
        """[3, n + 1] int32: the tokens, the coarsest windows and the rows before each document, and after the last."""
        return self._there(bounds_of(torch.stack([integers(self.lengths), *self.counts[:2]])))

    @cached_property
    def units(self) -> int:
        """Of all documents: each has one for every F tokens, and one for the rest, which may be empty."""
        return int((integers(self.lengths) // self.rule.window + 1).sum())

    @cached_property
    def unit_table(self) -> Tensor:
        """[3 * (n + 1) + 2 * units] int32, for the kernels: `bounds`; the document of each unit; its number in that."""
        each = self.bounds[0].diff() // self.rule.window + 1
        before = torch.nn.functional.pad(each.cumsum(0), (1, 0))
        document = numbered(before, self.units)
        number = torch.arange(self.units, device=each.device) - before[document]
        return torch.cat([self.bounds.flatten(), document.int(), number.int()])

    @cached_property
    def window_starts(self) -> Tensor:
        """[W] int32: the first token of each coarsest window."""
        tokens, windows, _ = self.bounds.long()
        number = runs(torch.zeros_like(windows[1:]), windows, sum(self.windows))
        return (tokens[numbered(windows, len(number))] + number * self.rule.window).int()

    @cached_property
    def tiles(self) -> Tensor:
        """[5, tiles] int32: windows and refined entries a level before each tile; its windows; its budget; whether it is the
        first of its document."""
        return self._there(self._tiles)

    @cached_property
    def budget(self) -> int:
        """Entries refined per level, of all documents together."""
        return int(self._tiles[3].sum())

    @cached_property
    def _tiles(self) -> Tensor:
        """`tiles`, on the CPU."""
        _, _, tiles, *last = self.counts
        before = tiles.cumsum(0) - tiles
        document = torch.arange(len(tiles)).repeat_interleave(tiles)
        number = torch.arange(len(document)) - before[document]
        is_last, full = number == tiles[document] - 1, (self.rule.tile_windows, self.rule.tile_budget)
        sizes = torch.stack([of[document].where(is_last, usual) for of, usual in zip(last, full, strict=True)])
        return torch.cat([sizes.cumsum(1) - sizes, sizes, (number == 0).unsqueeze(0)]).int()

    def _there(self, table: Tensor) -> Tensor:
        return table.to(self.cu_seqlens.device, non_blocking=True)


def integers(values: Any) -> Tensor:
    """As int64, on the CPU; numpy reads many of them in a tenth of torch's time."""
    return torch.from_numpy(numpy.array(values, dtype=numpy.int64))


def bounds_of(counts: Tensor) -> Tensor:
    """[..., n] -> [..., n + 1] int32: how many there are before each, and in all."""
    return torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int()


def numbered(bounds: Tensor, length: int) -> Tensor:
    """[length] int64: i for each of the places from bounds i to i + 1. Asks the device nothing."""
    return repeated(torch.arange(len(bounds) - 1, device=bounds.device), bounds.diff(), length)
