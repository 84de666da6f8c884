"""The mass scorer: a window counts as much as softmax attention among the coarsest windows gives to its keys."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from megatron_lighthouse.lighthouse.geometry import Pyramid, Shape
from megatron_lighthouse.lighthouse.scorers.base import Scorer, row_bytes
from megatron_lighthouse.lighthouse.scorers.both_ways import whole
from megatron_lighthouse.lighthouse.scorers.summary import coarsest

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.lighthouse.rotary import Rotary
    from megatron_lighthouse.lighthouse.steps import Steps


@dataclass(frozen=True)
class Mass(Scorer):
    """What queries and keys say of each other, and not how long they are: for models that norm them (ours).

    Of the coarsest windows, whose pooled queries attend to the pooled keys of all earlier windows: s^K is the softmax weight
    that a window's key gets from the later windows of its tile, s^Q the greatest weight that its query gives, both added up
    over the group's heads. Finer levels take the maxima of tokens: s^K is the product of a key with the mean query of its tile,
    s^Q how far the group's queries lie from those of their coarsest window (experiments/results/capture has what was tried).

    Scores depend on later tokens of the tile, as selections do.
    """

    name: str = "mass"
    reads_values: bool = False
    by_length: bool = False
    grows: str = "(N/F)²"
    by_scale: bool = True
    causal: bool = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pyramid: Pyramid,
        steps: Steps,
        exchange: Exchange | None,
        rotary: Rotary | None = None,
        scale: float | None = None,
    ) -> Tensor:
        import torch

        from megatron_lighthouse.sums import one_by_one

        run, layout, groups = implementation(steps), None if exchange is None else exchange.layout, key.shape[2]
        pooled, rows_k, _ = coarsest(query, key, key, pyramid, steps, rotary)
        rows_q, keys, alone = pooled, whole(rows_k, exchange), is_local(pyramid, exchange)
        lse, peak = run.rows(rows_q, keys, layout, scale)
        if alone:
            keys, layout = rows_k, None
        else:
            rows_q, lse = whole(rows_q, exchange), whole(lse.movedim(-1, 0), exchange).movedim(0, -1).contiguous()
        by_key = run.columns(rows_q, keys, lse, pyramid.tile, layout, scale)
        if exchange is not None and not alone:
            by_key = exchange.own(by_key.movedim(-1, 0)).movedim(0, -1)
        top = torch.stack([one_by_one(peak.unflatten(1, (groups, -1)), 2), by_key])
        if pyramid.levels == 2:
            return top
        mean = tile_means(rows_q, groups, pyramid.tile)
        return torch.cat([run.finer(query, key, pooled, mean, pyramid, layout)[..., : -top.shape[-1]], top], -1)

    def moved(self, pyramid: Pyramid, shape: Shape) -> float:
        """What the coarsest rows are pooled of, the tokens again for the finer levels, and the pooled rows twice."""
        rows = pyramid.entries(pyramid.levels - 1)
        pooled, again = shape.heads + 2 * shape.groups, (shape.heads + shape.groups) * (pyramid.levels > 2)
        return row_bytes(pyramid.seq_length, shape, pooled + again) + 2 * row_bytes(rows, shape, shape.heads + shape.groups)

    def flops(self, pyramid: Pyramid, shape: Shape) -> float:
        """One product of all earlier windows, and one of those of the tile."""
        rows = pyramid.entries(pyramid.levels - 1)
        return 1.0 * rows * (rows + pyramid.tile) * shape.batch * shape.heads * shape.dim

    def sent(self, pyramid: Pyramid, shape: Shape, size: int) -> int:
        """Keys; where tiles span chunks, queries and what their rows add up to as well."""
        rows = pyramid.entries(pyramid.levels - 1) // size
        each = shape.groups * shape.dim * shape.itemsize
        if rows // 2 % pyramid.tile:
            each += shape.heads * (shape.dim * shape.itemsize + max(4, shape.itemsize))
        return (size - 1) * rows * shape.batch * each


def implementation(steps: Steps) -> ModuleType:
    """What runs beside these steps: a module with `rows`, `columns` and `finer` as `mass_reference` has them."""
    from megatron_lighthouse.lighthouse import reference
    from megatron_lighthouse.lighthouse.scorers import mass_reference

    if steps is reference:
        return mass_reference
    from megatron_lighthouse.kernels.lighthouse import mass

    return mass


def is_local(pyramid: Pyramid, exchange: Exchange | None) -> bool:
    """Whether every tile lies in one chunk, so that its queries are those of the rank."""
    return exchange is None or pyramid.entries(pyramid.levels - 1) // 2 % pyramid.tile == 0


def tile_means(x: Tensor, groups: int, tile: int) -> Tensor:
    """The mean row of each tile and group: [n, B, H, D] -> [tiles, B, G, D], in a dtype of sums.

    Added up by halves, element by element, so that a tile's mean does not hang on how many tiles there are.
    """
    from torch.nn.functional import pad

    from megatron_lighthouse.sums import by_neighbours, one_by_one

    total, tiles = one_by_one(x.unflatten(2, (groups, -1)), 3), -(-x.shape[0] // tile)
    total = pad(total, (0, 0) * 3 + (0, tiles * tile - x.shape[0])).unflatten(0, (tiles, tile))
    total = by_neighbours(total, 1) / (tile * (x.shape[2] // groups))
    if rest := x.shape[0] % tile:  # the last tile has fewer
        total[-1] *= tile / rest
    return total
