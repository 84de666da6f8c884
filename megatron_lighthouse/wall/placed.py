"""A layer of Wall in its place in the model, and one over the rows that Lighthouse gathers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_lighthouse import running
from megatron_lighthouse.context_parallel.ring import Passage
from megatron_lighthouse.softmax import backends
from megatron_lighthouse.variant import Place
from megatron_lighthouse.wall import telemetry
from megatron_lighthouse.wall.config import WallConfig
from megatron_lighthouse.wall.gates import LogSigmoid, of_channels
from megatron_lighthouse.wall.layer import Gates, Layer, build
from megatron_lighthouse.wall.pieces import Sight


@dataclass(frozen=True)
class Placed:
    """A layer in its place in the model."""

    layer: Layer
    number: int

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
        attend: backends.Attend | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        gate, *scalar = streams
        with running.layer(self.number):
            telemetry.record(gate, self.layer.gates)
            return self.layer(query, key, value, gate, scalar[0] if scalar else None, sinks), None


@dataclass(frozen=True, eq=False)  # as softmax.variant.Rows
class Rows:
    """Over the rows that Lighthouse gathers. Keys have decayed to the end of their piece before they travel."""

    layer: Layer
    scalar: bool
    """Whether there are scalar gates; what follows them is the sink."""

    def passage(self) -> None:
        return None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *streams: Tensor, passage: Passage | None = None) -> Tensor:
        gate, *more = streams
        scalar = more.pop(0) if self.scalar else None
        return self.layer.over_rows(query, key, value, gate, scalar, more[0] if more else None)


def placed(config: WallConfig, query: Tensor, key: Tensor, place: Place, sight: Sight | None = None) -> Placed:
    """For inputs like these, of which shapes, dtype and device count; gates come as logits. Raises as `build`."""
    sight = replace(sight or Sight(), window=place.window)
    gates: dict[str, Gates] = {"gates": of_channels(config, place.rotary), "scalar_gates": LogSigmoid()}
    return Placed(_built(config, query, key, key, place, sight, **gates), place.number)


def rows(query: Tensor, key: Tensor, value: Tensor, place: Place, sight: Sight | None = None) -> Rows:
    """Over the rows that a Lighthouse layer in this place gathers, of gates; key and value have the model's G heads."""
    config = place.around or WallConfig()
    return Rows(_built(config, query, key, value, place, sight), config.scalar_gate)


def _built(
    config: WallConfig, query: Tensor, key: Tensor, value: Tensor, place: Place, sight: Sight | None, **gates: Gates
) -> Layer:
    return build(
        query,
        key,
        value,
        key.shape[2] if config.tied_gates else query.shape[2],
        place.exchange,
        place.comm_type,
        place.scale,
        sight=sight,
        kernels=config.kernels,
        biased=config.scalar_gate,
        **gates,
    )
