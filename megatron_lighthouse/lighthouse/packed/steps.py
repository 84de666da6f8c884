"""The steps over packed documents as an interface: `packed.reference`, or `megatron_lighthouse.kernels.lighthouse.packed`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.steps import Steps
from megatron_lighthouse.sequence.documents import Documents

Runs = tuple[tuple[int, int, int], ...]
"""Of rows of documents: the document, the first and the end of each run of them, counted in the document."""


def runs_of(documents: Documents) -> Runs:
    """All rows."""
    return tuple((i, 0, length) for i, length in enumerate(documents.lengths))


class PackedSteps(Protocol):
    """What `Steps` are for one sequence, for a row of t tokens. B is 1 but in `attended_norms`."""

    @property
    def alone(self) -> Steps:
        """The steps over one sequence."""

    def score(self, query: Tensor, key: Tensor, packing: Packing) -> Tensor:
        """[2, 1, G, coarse length]: see `Steps.score`."""

    def attended_norms(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents,
        runs: Runs | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """[B, G, n]: see `Steps.attended_norms`. No row of [n, B, ·, D] sees those of another document.

        Args:
            runs: the rows whose norms are asked for, all by default; those of the others may be anything.
        """

    def select(self, scores: Tensor, packing: Packing, pin_first: bool) -> Selection:
        """Choose entries in the tiles of each document: see `Steps.select`.

        In a tile of budget m the m/2 (rounded up) candidates of highest s^Q are refined, then the m/2 (rounded down) of highest
        s^K. `pin_first` lets the first window of each document win. Loose tokens are gathered as they are.
        """

    def gather(
        self, query: Tensor, key: Tensor, value: Tensor, selection: Selection, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The selected rows, document by document: see `Steps.gather`."""

    def scatter(self, rows: Tensor, selection: Selection) -> Tensor:
        """Add each row to the positions of its spill range that are in its document: see `Steps.scatter`."""
