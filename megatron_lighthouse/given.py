"""Arguments of the library's functions: whether each is of the type that the function names."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.sequence.documents import Documents

KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("query", "key", "value", "r"), (Tensor,)),
    "config": (LighthouseConfig,),
    "rotary": (Rotary,),
    "sinks": (Tensor,),
    "cp_group": (ProcessGroup,),
    "cu_seqlens": (Tensor, Documents),
    "softmax_scale": (Real,),
}
NEEDED = ("query", "key", "value", "r", "config")


def check_types(**given: Any) -> None:
    """Look at arguments by their names; None is right for those that need not be given.

    Raises:
        TypeError: the argument, its type, and what it should be.
        ValueError: a `softmax_scale` that is not finite.
    """
    if torch.compiler.is_compiling():
        return
    for name, value in given.items():
        if value is None and name not in NEEDED:
            continue
        if name == "attend":
            if not callable(value):
                raise TypeError(f"attend must be a function of query, key and value, not a {type(value).__name__}: {value!r}.")
        elif not isinstance(value, KINDS[name]):
            kinds = " or ".join("number" if kind is Real else f"{kind.__module__}.{kind.__name__}" for kind in KINDS[name])
            raise TypeError(f"{name} must be a {kinds}, not a {type(value).__name__}.")
    scale = given.get("softmax_scale")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"softmax_scale {scale} must be finite: leave it out for 1/sqrt(D).")


def check_sinks(sinks: Tensor | None, query: Tensor, attend: object, cu_seqlens: object) -> None:
    """Raises ValueError where sinks, [H], do not fit the query [N, B, H, D], or come beside what takes none."""
    if sinks is None:
        return
    if attend is not None or cu_seqlens is not None:
        other = "attend" if attend is not None else "cu_seqlens"
        raise ValueError(f"sinks belong to the default inner attention over one sequence: leave out `sinks` or `{other}`.")
    if query.dim() == 4 and (sinks.shape != query.shape[2:3] or sinks.device != query.device):
        raise ValueError(
            f"sinks must be [{query.shape[2]}] on {query.device}, one a query head, not {list(sinks.shape)} on {sinks.device}."
        )
