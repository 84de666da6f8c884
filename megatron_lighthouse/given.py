"""Arguments of the library's functions: whether each is of the type that the function names."""

from __future__ import annotations

import math
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.sequence.documents import Documents

KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("query", "key", "value", "r", "gate", "scalar_gate", "sink"), (Tensor,)),
    "config": (LighthouseConfig,),
    "rotary": (Rotary,),
    "sinks": (Tensor,),
    "cp_group": (ProcessGroup,),
    "cu_seqlens": (Tensor, Documents),
    "softmax_scale": (Real,),
    "window": (Integral,),
}
NUMBERS: dict[type, str] = {Real: "number", Integral: "whole number"}
NEEDED = ("query", "key", "value", "r", "gate", "config")


def check_types(**given: Any) -> None:
    """Look at arguments by their names; None is right for those that need not be given.

    Raises:
        TypeError: the argument, its type, and what it should be.
        ValueError: a `softmax_scale` that is not above 0 and finite.
    """
    if torch.compiler.is_compiling():
        return
    for name, value in given.items():
        if value is None and name not in NEEDED:
            continue
        if name == "attend":
            if not callable(value):
                raise TypeError(f"attend must be a function of query, key and value, not a {type(value).__name__}: {value!r}.")
        elif not isinstance(value, KINDS[name]) or isinstance(value, bool):
            kinds = " or ".join(NUMBERS.get(kind) or f"{kind.__module__}.{kind.__name__}" for kind in KINDS[name])
            raise TypeError(f"{name} must be a {kinds}, not a {type(value).__name__}.")
    scale = given.get("softmax_scale")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"softmax_scale {scale} must be above 0 and finite: leave it out for 1/sqrt(D).")


def check_tokens(query: Tensor, window: int | None, exchange: Exchange | None) -> None:
    """Raises ValueError for a window, or a shard, that attention to all tokens cannot be over."""
    if window is not None and window < 1:
        raise ValueError(f"window {window} must be at least 1, for a query sees itself: use 1 or more, or None for all tokens.")
    if exchange is not None and query.shape[0] % 2:
        raise ValueError(f"a rank holds two chunks of equal length, got {query.shape[0]} tokens: pad the sequence.")


def bounds_of(cu_seqlens: Tensor, query: Tensor, ranks: int = 1) -> tuple[int, ...]:
    """Of documents in one row of `ranks` ranks, where each begins and the last ends. Reads them on the host.

    Raises:
        ValueError: what is not [documents + 1] int32 or int64, does not rise from 0 to N, or comes with B > 1.
        TypeError: no tensor.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a torch.Tensor, not a {type(cu_seqlens).__name__}.")
    if query.shape[1] != 1:
        raise ValueError(f"cu_seqlens is of one row of tokens, B = 1, got B = {query.shape[1]}: lay the rows end to end.")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be [documents + 1] int32 or int64, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}."
        )
    places, tokens = cu_seqlens.tolist(), query.shape[0] * ranks
    if len(places) < 2 or places[0] != 0 or places[-1] != tokens or any(a > b for a, b in pairwise(places)):
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of the query, got {places[:8]} … {places[-1:]}.")
    return tuple(places)


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
