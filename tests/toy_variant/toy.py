"""The attention: logits t_h * (q + r)·k, with r a stream, and t_h = warmest^(h / (H - 1)) for head h of H. Ours, a toy."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.options import option
from megatron_lighthouse.softmax.backends import Attend, inner_attention
from megatron_lighthouse.softmax.inputs import check_backend
from megatron_lighthouse.softmax.rows import RowKind
from megatron_lighthouse.softmax.sharded import sharded_attention
from megatron_lighthouse.variant import Place, Stream, Variant


@dataclass(frozen=True)
class ToyConfig:
    """Options of the toy."""

    warmest: float = option(2.0, "What the logits of the last head are multiplied by.")
    heads: int = option(4, "Query heads of the model.")
    inner: str = option("auto", "The softmax.", ("auto", "sdpa"))

    def __post_init__(self) -> None:
        if self.warmest <= 0:
            raise ValueError(f"--toy-warmest {self.warmest} must be positive: use 2.")


@dataclass(frozen=True)
class Layer:
    temperatures: Tensor
    """[H, 1], of this rank's heads."""
    attend: Attend

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *streams: Tensor, attend: Attend | None = None
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        (more,) = streams
        return self.attend((query + more) * self.temperatures, key, value), None


class Toy(Variant):
    name, title, help = "toy", "the toy", "is a toy"
    config = ToyConfig
    streams = (Stream("r", init=torch.nn.init.zeros_ if "TOY_ZERO" in os.environ else None),)
    dense_weights = "TOY_ALONE" not in os.environ

    def check_installed(self, config: ToyConfig, inputs: RowKind, place: Place) -> None:
        check_backend(config.inner, inputs, place.exchange.size if place.exchange else 1, place.comm_type)

    def build(self, config: ToyConfig, query: Tensor, key: Tensor, place: Place) -> Layer:
        numbers = place.first_head + torch.arange(query.shape[2], device=query.device)
        temperatures = (config.warmest ** (numbers / (config.heads - 1))).to(query.dtype).unsqueeze(-1)
        if place.exchange is None:
            return Layer(temperatures, inner_attention(config.inner, query, key, place.scale))
        how: Any = (place.exchange, place.comm_type, place.scale)
        return Layer(temperatures, sharded_attention(config.inner, query, key, *how))


TOY = Toy()
