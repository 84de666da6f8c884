"""A row of packed documents: which of its tokens form windows, and the rows that each document becomes.

The windows of all documents, one after the other, are those of one sequence of W*F tokens: the row without its loose tokens,
which are the documents' tails and whole documents. So levels 1..L-1 are numbered as in that sequence's pyramid (`compact`), and
level 0 is the row itself. No window holds tokens of two documents, no tile has windows of two, and no spill is followed into
the next. Rows stand document by document, each one's in causal order, its tail last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.packed.rule import Rule, Tile
from megatron_lighthouse.sequence.documents import Documents


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
    def tiles_of(self) -> tuple[tuple[Tile, ...], ...]:
        """The tiles of each document; none where it is whole."""
        return tuple(map(self.rule.tiles, self.lengths))

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """Coarsest windows of each document; 0 where it is whole."""
        return tuple(sum(tile.windows for tile in tiles) for tiles in self.tiles_of)

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
        return Documents(self.bounds[2], tuple(map(self.rule.rows, self.lengths)))

    @cached_property
    def gathered_length(self) -> int:
        """S, rows of all documents together."""
        return sum(map(self.rule.rows, self.lengths))

    @cached_property
    def bounds(self) -> Tensor:
        """[3, n + 1] int32: the tokens, the coarsest windows and the rows before each document, and after the last."""
        counts = (self.lengths, self.windows, map(self.rule.rows, self.lengths))
        return self._table([accumulate(count, initial=0) for count in counts])

    @cached_property
    def units(self) -> int:
        """Of all documents: each has one for every F tokens, and one for the rest, which may be empty."""
        return sum(length // self.rule.window + 1 for length in self.lengths)

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
        document = numbered(self.bounds[1], sum(self.windows))
        number = torch.arange(len(document), device=document.device) - self.bounds[1][document]
        return (self.bounds[0][document] + number * self.rule.window).int()

    @cached_property
    def tiles(self) -> Tensor:
        """[5, tiles] int32: windows and refined entries a level before each tile; its windows; its budget; whether it is the
        first of its document."""
        every = [(tile, i == 0) for tiles in self.tiles_of for i, tile in enumerate(tiles)]
        windows, budgets = [tile.windows for tile, _ in every], [tile.budget for tile, _ in every]
        before = [list(accumulate(x, initial=0))[:-1] for x in (windows, budgets)]
        return self._table([*before, windows, budgets, [first for _, first in every]])

    @cached_property
    def budget(self) -> int:
        """Entries refined per level, of all documents together."""
        return sum(tile.budget for tiles in self.tiles_of for tile in tiles)

    def _table(self, rows: Iterable[Iterable[int]]) -> Tensor:
        return torch.tensor([list(row) for row in rows], dtype=torch.int32).to(self.cu_seqlens.device, non_blocking=True)


def numbered(bounds: Tensor, length: int) -> Tensor:
    """[length] int64: i for each of the places from bounds i to i + 1. Asks the device nothing."""
    numbers = torch.arange(len(bounds) - 1, device=bounds.device)
    return numbers.repeat_interleave(bounds.diff(), output_size=length)
