"""What a call may be given, and what goes with what: checked before anything is computed or sent."""

from __future__ import annotations

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.softmax.inputs import check


def check_scale(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None, attend: object) -> None:
    """Raises ValueError for a scale beside an inner attention, which has its own."""
    if attend is not None and softmax_scale is not None:
        check(query, key, value)
        raise ValueError("softmax_scale belongs to the default inner attention: give `attend` its own scale instead.")


def check_sinks(sinks: Tensor | None, query: Tensor, attend: object, cu_seqlens: object) -> None:
    """Raises ValueError for sinks that nothing would read, or of another shape."""
    if sinks is None:
        return
    if attend is not None or cu_seqlens is not None:
        other = "attend" if attend is not None else "cu_seqlens"
        raise ValueError(f"sinks belong to the default inner attention over one sequence: leave out `sinks` or `{other}`.")
    if query.dim() == 4 and (sinks.shape != query.shape[2:3] or sinks.device != query.device):
        raise ValueError(
            f"sinks must be [{query.shape[2]}] on {query.device}, one a query head, not {list(sinks.shape)} on {sinks.device}."
        )


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
