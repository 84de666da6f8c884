"""Lighthouse Attention: pool, score, select, gather, attend, scatter (arXiv 2605.06554)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse import telemetry
from megatron_lighthouse.config import LighthouseConfig
from megatron_lighthouse.inner import Attend, inner_attention
from megatron_lighthouse.ranges import step
from megatron_lighthouse.scorers import SCORERS
from megatron_lighthouse.selection import Selection
from megatron_lighthouse.steps import Steps, steps_for


def lighthouse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LighthouseConfig,
    *,
    softmax_scale: float | None = None,
    attend: Attend | None = None,
    selection: Selection | None = None,
) -> Tensor:
    """Causal attention through a selected set of pyramid entries.

    Args:
        query: [N, B, H, D], after RoPE; any floating dtype, any strides. Megatron's "sbhd".
        key, value: [N, B, G, D], G dividing H; same dtype and device as the query.
        softmax_scale: of the inner attention; 1/sqrt(D) by default. Not with `attend`.
        attend: the inner attention; the backend that `config.inner` names by default.
        selection: attend to these entries instead of selecting (it carries no gradient either way).

    Returns:
        [N, B, H, D] in the query's dtype. Position j depends on tokens 0..j, once the selection is fixed; which
        windows are refined also depends on the later tokens of their tile.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, an N that does not fit the config, or an inner attention
            that is forced and is not there.
    """
    rows, selection, steps = attend_to_selection(
        query, key, value, config, softmax_scale=softmax_scale, attend=attend, selection=selection
    )
    return steps.scatter(rows, selection)


def attend_to_selection(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LighthouseConfig,
    *,
    softmax_scale: float | None = None,
    attend: Attend | None = None,
    selection: Selection | None = None,
) -> tuple[Tensor, Selection, Steps]:
    """All steps of `lighthouse_attention` but the last: the attended rows [S, B, H, D], and what scatters them."""
    _check(query, key, value)
    if attend is None:
        attend = inner_attention(config.inner, query, key, softmax_scale)
    elif softmax_scale is not None:
        raise ValueError("softmax_scale belongs to the default inner attention: give `attend` its own scale instead.")
    if selection is None:
        selection = _select(query, key, config)
    elif selection.geometry != config.geometry(query.shape[0]):
        raise ValueError(f"selection was made for {selection.geometry}, not for {config.geometry(query.shape[0])}.")
    elif selection.places.shape[:2] != (query.shape[1], key.shape[2]):
        raise ValueError(
            f"selection was made for [B, G] {list(selection.places.shape[:2])}, not for [{query.shape[1]}, {key.shape[2]}]."
        )
    telemetry.record(selection)
    steps = steps_for(config.steps, query)
    gathered = steps.gather(query, key, value, selection)
    with step("attend"):
        return attend(*gathered), selection, steps


def lighthouse_select(query: Tensor, key: Tensor, config: LighthouseConfig) -> Tensor:
    """The entries that `lighthouse_attention` attends to.

    Args:
        query, key: as for `lighthouse_attention`.

    Returns:
        [B, G, S] int64, in causal order, numbered in the concatenated pyramid (level 0 first).

    Raises:
        ValueError: as `lighthouse_attention`.
    """
    _check(query, key, key)
    return _select(query, key, config).indices


@torch.no_grad()
def _select(query: Tensor, key: Tensor, config: LighthouseConfig) -> Selection:
    geometry, steps = config.geometry(query.shape[0]), steps_for(config.steps, query)
    scores = SCORERS[config.scorer](query, key, geometry, steps)
    return steps.select(scores, geometry, config.pin_first)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(f"expected query [N, B, H, D] and key and value of one shape [N, B, G, D], got {shapes}.")
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query, key and value must agree in N, B and D, got {shapes}.")
    if not key.shape[2] or query.shape[2] % key.shape[2]:
        raise ValueError(f"the query heads (dimension 2) must be a multiple of the key/value heads, got {shapes}.")
    kinds = {(x.dtype, x.device) for x in (query, key, value)}
    if len(kinds) > 1 or not query.dtype.is_floating_point:
        raise ValueError(f"query, key and value must share one floating dtype and one device, got {sorted(map(str, kinds))}.")
