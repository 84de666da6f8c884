"""What a tiled loss knows of its gradient before there is one: how much each token's loss will count, up to a factor.

A training loop sums losses by its loss mask, or by weights that it makes of it. Whoever knows better says so (`weighted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ROUNDED = 1e-6
"""How far a gradient may lie from a multiple of the weights, relatively: some ten roundings of fp32."""


class _Said:
    main: Tensor | None = None
    """Of the model that runs."""
    further: Tensor | None = None
    """What multi-token prediction moved last: before it asks for a loss, that is the loss's mask."""


@contextmanager
def weighted(weights: Tensor | None) -> Iterator[None]:
    """While a model runs: the weights [b, s] by which its losses will be summed."""
    before, _Said.main = _Said.main, weights
    try:
        yield
    finally:
        _Said.main = before


def rolled(inner: Callable[..., tuple[Any, Any]], *given: Any, **named: Any) -> tuple[Any, Any]:
    """In place of `roll_tensor`."""
    found = inner(*given, **named)
    _Said.further = found[0]
    return found


def expected(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Those of labels [b, s], fp32: a further token's mask, what was said, the model's loss mask, or the same for all."""
    known, _Said.further = (_Said.further, _Said.main, mask), None
    return next((x for x in known if x is not None and x.shape == labels.shape), torch.ones_like(labels)).float()


def multiple(grad: Tensor, weights: Tensor) -> float | None:
    """The number that times `weights` [b, s] is `grad`, if one is. Waits for the device."""
    grad, weights = grad.double(), weights.double()
    factor = (grad * weights).sum() / (weights * weights).sum().clamp(min=torch.finfo(torch.float64).tiny)
    near = ((grad - factor * weights).abs() <= ROUNDED * (factor * weights).abs()).all()
    found, is_one = torch.stack([factor, near.double()]).tolist()
    return float(found) if is_one else None
