"""Where the tokens and entries of a packed row stand, as tables of numbers: for the steps in plain PyTorch.

All int64, on the device of `cu_seqlens`, and made once for a packing.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.packed.packing import Packing, numbered
from megatron_lighthouse.sequence.documents import runs


class Maps:
    """Of one packing."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    @staticmethod
    def of(packing: Packing) -> Maps:
        """Those of a packing; made once."""
        maps: Maps = vars(packing).setdefault("maps", Maps(packing))
        return maps

    @cached_property
    def tokens(self) -> Tensor:
        """[n + 1]: tokens before each document."""
        return self.packing.bounds[0].long()

    @cached_property
    def windows(self) -> Tensor:
        """[n + 1]: coarsest windows before each document."""
        return self.packing.bounds[1].long()

    @cached_property
    def rows(self) -> Tensor:
        """[n + 1]: rows before each document."""
        return self.packing.bounds[2].long()

    @cached_property
    def document(self) -> Tensor:
        """[t]: the document of each token."""
        return numbered(self.tokens, self.packing.seq_length)

    @cached_property
    def position(self) -> Tensor:
        """[t]: the place of each token in its document, from 0."""
        return runs(torch.zeros_like(self.tokens[1:]), self.tokens, self.packing.seq_length)

    @cached_property
    def inside(self) -> Tensor:
        """[W*F]: the tokens that form windows, in order."""
        return self._in_windows(0, 1)

    def last(self, width: int) -> Tensor:
        """[W*F / width]: the last token of each window of so many tokens."""
        return self._in_windows(width - 1, width)

    def _in_windows(self, first: int, step: int) -> Tensor:
        """[W * F / step]: of each coarsest window this token, and every so many after it."""
        starts = self.packing.window_starts.long()
        return (starts.unsqueeze(1) + torch.arange(first, self.packing.rule.window, step, device=starts.device)).flatten()

    @cached_property
    def window_document(self) -> Tensor:
        """[W]: the document of each coarsest window."""
        return numbered(self.windows, sum(self.packing.windows))

    @cached_property
    def loose_row(self) -> Tensor:
        """[t]: the row of each token that is in no window; -1 of the others."""
        document, window = self.document, self.packing.rule.window
        in_windows = self.windows.diff()[document] * window
        row = self.rows[document + 1] - self.tokens.diff()[document] + self.position
        return row.where(self.position >= in_windows, -1)

    @cached_property
    def rows_shift(self) -> Tensor:
        """[W]: the rows of loose tokens before each coarsest window."""
        document = self.window_document
        return self.tokens[document] - self.packing.rule.window * self.windows[document]

    def received(self, level: int) -> Tensor:
        """[t]: the entry of `level` (from 1) whose row each position gets; -1 where there is none.

        Of its own document, the last window that is complete at the position: (j - p^l + 1) // p^l, but in a tail the windows
        end before it.
        """
        width, finer = self.packing.window(level), self.packing.rule.window // self.packing.window(level)
        entry = (self.position + 1) // width - 1
        there = (entry >= 0) & (entry < self.windows.diff()[self.document] * finer)
        return (self.windows[self.document] * finer + entry).where(there, -1)

    def spilled(self, level: int) -> Tensor:
        """[entries of the level, p^l]: the positions that get the row of each entry of `level` (from 1); t where the document
        has ended. What `received` says, the other way."""
        width = self.packing.window(level)
        last = self.last(width)
        position = last.unsqueeze(1) + torch.arange(width, device=last.device)
        end = self.tokens[self.document[last] + 1].unsqueeze(1)
        return position.where(position < end, self.packing.seq_length)
