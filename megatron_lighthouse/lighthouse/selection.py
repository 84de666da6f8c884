"""Selection: which entries of the pyramid a layer gathers, as the map from each entry to its row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.geometry import Pyramid


@dataclass(frozen=True)
class Selection:
    """The gathered entries of one layer, as the inverse map from entries to rows. Carries no gradient.

    By this map gather and scatter are gathers, forward and backward: no atomics, and every element is written once. Under
    context parallelism it holds the entries of this rank's two chunks, numbered as if the two were one sequence.
    """

    geometry: Pyramid
    """Of the tokens that this rank holds."""
    places: Tensor
    """[B, G, pyramid length] int32: the row in 0..S-1 that each entry has, or -1 if it is not gathered. Entries are
    numbered in the concatenated pyramid, level 0 first."""
    length: int
    """S, rows. A batch element and head may use fewer, where its chunks hold fewer than another's."""
    chunks: int = 1
    """Contiguous runs of the sequence, equally long, that the tokens are made of: what spills past the end of one goes to
    the chunk that follows it in the whole sequence, not to the next one here."""
    spills: Tensor | None = None
    """As `places`, but -1 also for rows that are keys and values alone and not scattered (`causal`). None: all are."""

    @property
    def scattered(self) -> Tensor:
        """The places of the rows that are scattered."""
        return self.places if self.spills is None else self.spills

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(N, L, p, S, chunks), for the kernels."""
        return *self.geometry.pyramid, self.length, self.chunks

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """Views of `places`, one a level: [B, G, N/p^l]."""
        return self.by_level(self.places)

    def by_level(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views of something of each entry, [..., pyramid length], one a level."""
        return x.split(self.geometry.level_lengths, -1)

    @property
    def last_places(self) -> Tensor:
        """[chunks, L-1, B, G] int32: the rows of the last entry of each chunk at levels 1..L-1, the entries that spill
        into the next chunk; -1 where it is not gathered."""
        last = [x.unflatten(-1, (self.chunks, -1))[..., -1] for x in self.rows[1:]]
        return torch.stack(last).permute(3, 0, 1, 2)

    @property
    def indices(self) -> Tensor:
        """[B, G, S] int64: the entries in causal order. Made anew at each call: no step needs it."""
        places = self.places.long()
        entry = torch.arange(places.shape[-1], device=places.device).expand_as(places)
        # entries that are not gathered are written to one slot behind the end, which is cut off
        indices = places.new_zeros(*places.shape[:2], self.length + 1)
        return indices.scatter_(-1, places.where(places >= 0, self.length), entry)[..., : self.length].contiguous()
