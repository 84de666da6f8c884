"""torch's `once_differentiable`, for less of the host's time."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, without what it costs the host where backward makes no graph: as it nearly always is."""
    refusing = function.once_differentiable(backward)

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return once
