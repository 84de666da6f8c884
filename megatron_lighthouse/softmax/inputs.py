"""Queries, keys and values: what is taken from their shapes, and the rules these must keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.softmax.backends import choose, choose_for_blocks, deterministic
from megatron_lighthouse.softmax.blocks import BLOCKS
from megatron_lighthouse.softmax.rows import SHARDS, SINKS, RowKind
from megatron_lighthouse.softmax.sinks import CHANNELS, key_row_backends

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Those that the steps and the inner attention compute in."""


def check_backend(name: str, rows: RowKind, ranks: int, comm_type: str, sinks: bool = False) -> None:
    """Raises ValueError where the backend `name` ('auto': any) cannot attend to such rows, on so many ranks."""
    kind = (rows.device, rows.dtype, rows.heads, rows.groups)
    alone = ranks == 1 or comm_type == "a2a"
    if alone and sinks and name in key_row_backends(rows.dim):
        choose(name, *kind, rows.dim + CHANNELS)
    elif alone and not sinks:
        choose(name, *kind, rows.dim, rows.value_dim)
    else:
        choose_for_blocks(name, list(BLOCKS), rows, SINKS if alone else SHARDS)


def made_from(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """All that a layer and `check` take from inputs, and from torch's settings."""
    kinds = (query.dtype, key.dtype, value.dtype, query.device, key.device, value.device)
    return query.shape, key.shape, value.shape, *kinds, deterministic()


def check(query: Tensor, key: Tensor, value: Tensor, one_dim: bool = False) -> None:
    """Raises ValueError where shapes or dtypes do not fit each other; `one_dim`: values must have the D of keys."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    same = key.shape == value.shape or (
        not one_dim and value.dim() == 4 and key.shape[:3] == value.shape[:3] and value.shape[3]
    )
    if query.dim() != 4 or key.dim() != 4 or not same:
        other = "" if one_dim else " (values may have another D)"
        raise ValueError(f"expected query [N, B, H, D] and key and value of one shape [N, B, G, D]{other}, got {shapes}.")
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query [N, B, H, D], key and value [N, B, G, D] must agree in N, B and D, got {shapes}.")
    if not query.shape[2] or not key.shape[2] or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"the query heads (dimension 2) must be a multiple of the key/value heads, and neither can be 0, got {shapes}."
        )
    if not query.numel():
        raise ValueError(f"N, B and D must be at least 1, got {shapes}.")
    kinds = {(x.dtype, x.device) for x in (query, key, value)}
    if len(kinds) > 1 or query.dtype not in DTYPES:
        raise ValueError(
            "query, key and value must share one device and one dtype, float64, float32, bfloat16 or float16, got "
            f"{sorted(map(str, kinds))}."
        )
