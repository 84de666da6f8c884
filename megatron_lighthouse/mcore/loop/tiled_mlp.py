"""MLPs, one tile of the sequence at a time: only a tile's activations are held, and backward computes them again.

Each token's output is that of the whole, up to how products of other sizes round. Backward runs each tile's forward once more.
With Transformer Engine the norm before an MLP is part of it. Experts, which have tokens of their own, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_lighthouse.mcore.global_args import global_args
from megatron_lighthouse.mcore.loop.summed import Summed, apart

type Output = tuple[Tensor, Tensor | None]


def forward(inner: Callable[..., Output], mlp: Any, hidden: Tensor, *given: Any, **named: Any) -> Output:
    """In place of MLP's `forward`: [s, b, h] -> [s, b, h] and a bias [h], or None."""
    tokens = getattr(global_args(), "mlp_tile_tokens", 0)
    whole = type(mlp) is not MLP or given or named.get("per_token_scale") is not None
    if whole or not tokens or hidden.shape[0] * hidden.shape[1] <= tokens:
        return inner(mlp, hidden, *given, **named)
    rows = hidden.shape[0]
    count = -(-rows // max(1, tokens // hidden.shape[1]))
    parts = hidden.split(-(-rows // count))  # one node: of tensor_split each part's gradient is as large as the whole
    owners = [*_read(mlp)]
    fused = mlp.config.gradient_accumulation_fusion
    weights = [module._parameters[name] for module, name in owners]
    summed = [Summed(weight, len(parts), fused and weight.dim() > 1) for weight in weights]

    def of_tile(part: Tensor, *weights: Tensor) -> Output:
        with _standing(owners, weights):
            return inner(mlp, part, **named)

    found = [apart(of_tile, part, *(weight.use() for weight in summed)) for part in parts]
    return torch.cat([output for output, _ in found]), found[-1][1]


def _read(mlp: Any) -> Iterator[tuple[Any, str]]:
    """The parameters that an MLP computes with: all but the last bias, which it hands on to be added later."""
    for module in mlp.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (module, name) != (mlp.linear_fc2, "bias"):
                yield module, name


@contextmanager
def _standing(owners: list[tuple[Any, str]], weights: tuple[Tensor, ...]) -> Iterator[None]:
    """While it lasts, these are what modules read as their parameters, which they hide."""
    for (module, name), weight in zip(owners, weights, strict=True):
        vars(module)[name] = weight
    try:
        yield
    finally:
        for module, name in owners:
            del vars(module)[name]
