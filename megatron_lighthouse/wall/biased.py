"""Scalar gates as channels of queries and keys, so that kernels of softmax attention, which know no bias, take them. Ours.

    scale (q·k + c Σ_m k_m + 0 · c) = scale q·k + b        k_m: b / (scale c), cut into three numbers of the rows' dtype

b is a key's, its scalar gates up to the anchor. A query's own, from the anchor on, is the same for all keys: it is added to the
log-sum-exp. The gradient of b comes back in the keys' channels; that of the query's in its last one, in which all keys have c.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COLUMNS = 4
LEAST = -8192.0
"""What biases are raised to: e^LEAST is 0 in every dtype, and LEAST no infinity, of which differences are nan."""


def of_rows(bias: Tensor) -> Tensor:
    """The queries' [n, B, H, 1], as a log-sum-exp [B, H, n]."""
    return bias.clamp(min=LEAST).squeeze(-1).permute(1, 2, 0)


def columns(bias: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[COLUMNS] of all queries, and [m, B, H, COLUMNS] of keys, of the keys' bias [m, B, H, 1] in the dtype of sums."""
    unit, rest = _unit(scale), bias.clamp(min=LEAST) / (scale * _unit(scale))
    parts = []
    for _ in range(COLUMNS - 1):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1]
    of_query = torch.tensor([unit] * len(parts) + [0.0], dtype=dtype, device=bias.device)
    return of_query, torch.cat([*parts, torch.full_like(parts[0], unit)], -1)


def gradients(of_query: Tensor, of_key: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the queries' bias and the keys', [..., 1] each: of the gradients of queries and keys, from `columns` on."""
    each = 1 / (scale * _unit(scale))
    return of_query[..., COLUMNS - 1 : COLUMNS].to(dtype) * each, of_key[..., :1].to(dtype) * each


def _unit(scale: float) -> float:
    """c, a power of two about 1 / scale: exact in every dtype."""
    return 2.0 ** round(-math.log2(scale))
