"""Where windows stand in their tiles, and tokens in windows: of one sequence, or of a row of packed documents."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.geometry import Geometry, Pyramid
from megatron_lighthouse.lighthouse.packed.maps import Maps
from megatron_lighthouse.lighthouse.packed.packing import Packing, bounds_of
from megatron_lighthouse.sequence.documents import repeated, runs


def places_in_tiles(geometry: Geometry | Packing, device: torch.device) -> tuple[Tensor, Tensor]:
    """[coarsest windows] int64 each: the number of each window in its tile, from 0, and how many windows that has."""
    if isinstance(geometry, Packing):
        sizes, count = geometry.tiles[2].long(), sum(geometry.windows)
        bounds = bounds_of(sizes).long()
        return runs(torch.zeros_like(sizes), bounds, count), repeated(sizes, sizes, count)
    number = torch.arange(geometry.tile, device=device).repeat(geometry.tiles)
    return number, torch.full_like(number, geometry.tile)


def by_token(geometry: Pyramid, x: Tensor, level: int) -> Tensor:
    """[..., entries of `level`] -> [..., tokens]: of each token's entry; 0 of tokens in no window, where `level` is above 0."""
    if level == 0:
        return x
    spread = x.repeat_interleave(geometry.window(level), -1)
    if not isinstance(geometry, Packing):
        return spread
    out = spread.new_zeros(*spread.shape[:-1], geometry.seq_length)
    out[..., Maps.of(geometry).inside] = spread
    return out


def in_windows(geometry: Pyramid, x: Tensor) -> Tensor:
    """[..., tokens] -> [..., those in windows]."""
    return x[..., Maps.of(geometry).inside] if isinstance(geometry, Packing) else x


def first_tokens(geometry: Pyramid, device: torch.device) -> Tensor:
    """[tokens] int64: the first of the sequence, or of the document, of each."""
    if isinstance(geometry, Packing):
        return torch.arange(geometry.seq_length, device=device) - Maps.of(geometry).position
    return torch.zeros(geometry.seq_length, dtype=torch.int64, device=device)
