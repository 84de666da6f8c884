"""What a call may be given, and what goes with what: checked before anything is computed or sent."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.around import AROUND
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.softmax.inputs import check
from megatron_lighthouse.variant import Place


def check_own(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LighthouseConfig,
    streams: Sequence[Tensor],
    place: Place,
) -> None:
    """Raises ValueError for what is of the default inner attention beside another, and for streams that it does not read;
    TypeError for streams that are no tensors, and for options of another attention."""
    scaled = place.scale is not None and not SCORERS[config.scorer].by_scale
    if place.base_attends and (scaled or place.around is not None):
        check(query, key, value)
        name, own = ("softmax_scale", "scale") if scaled else ("around", "options")
        raise ValueError(f"{name} belongs to the default inner attention: give `attend` its own {own} instead.")
    for x in streams:
        if not isinstance(x, Tensor):
            raise TypeError(f"streams must be torch.Tensors, not a {type(x).__name__}.")
    variant = AROUND[config.around]
    if place.around is not None and not (variant.config and isinstance(place.around, variant.config)):
        wanted = f"a {variant.config.__name__}" if variant.config else "None, for it has no options"
        raise TypeError(f"around of config.around {config.around} must be {wanted}, not a {type(place.around).__name__}.")
    if problem := variant.streams_problem(place.around, query, key, streams, place.exchange):
        check(query, key, value)
        raise ValueError(problem)


def check_selection(selection: Selection, query: Tensor, groups: int, geometry: Pyramid, exchange: Exchange | None) -> None:
    """Raises ValueError or TypeError for a selection that is not one of such inputs."""
    if exchange is not None:
        raise ValueError("a selection can be given without context parallelism alone: leave out `selection` or `cp_group`.")
    if not isinstance(selection, Selection):
        raise TypeError(
            f"selection must be a megatron_lighthouse.lighthouse.selection.Selection, not a {type(selection).__name__}: pass "
            "`attended_rows(query, key, value, config).selection` (of megatron_lighthouse.lighthouse.attention), or leave it "
            "out. What lighthouse_select gives are numbers of entries."
        )
    if selection.geometry != geometry:
        raise ValueError(f"selection was made for {selection.geometry}, not for {geometry}.")
    if selection.places.shape[:2] != (query.shape[1], groups):
        made = list(selection.places.shape[:2])
        raise ValueError(f"selection was made for [B, G] {made}, not for [{query.shape[1]}, {groups}].")
