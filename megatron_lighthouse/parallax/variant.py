"""Parallax as a variant: what Megatron's side, the plan and the scripts ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_lighthouse import running
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.sharded.sent import attend_bytes
from megatron_lighthouse.parallax.config import ParallaxConfig
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.variant import Place, Stream, Variant, shared_out_problem

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.parallax.layer import Attend
    from megatron_lighthouse.softmax import backends
    from megatron_lighthouse.softmax.inputs import Inputs

FLOAT64 = 8
"""Bytes."""


@dataclass(frozen=True)
class Layer:
    """A layer in its place in the model."""

    attend: Attend
    number: int

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *streams: Tensor, attend: backends.Attend | None = None
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        (r,) = streams
        with running.layer(self.number):
            return self.attend(query, r, key, value), None


class Parallax(Variant):
    """Parallax (arXiv 2605.29157): a projection R of its own."""

    name, title = "parallax", "Parallax"
    help = "subtracts from softmax attention the covariance of its values with a further projection, linear_r"
    config = ParallaxConfig
    streams = (Stream("r", like_queries=True, zero_at_first=True),)
    dense_weights = False
    corrects = True

    def problems(self, config: ParallaxConfig, model: Any) -> Iterator[str]:
        yield from super().problems(config, model)
        groups, ranks = model.num_query_groups or model.num_attention_heads, model.tensor_model_parallel_size
        if message := shared_out_problem("--num-query-groups", groups, ranks):
            yield message

    def remarks(self, config: ParallaxConfig, args: Any) -> Iterator[str]:
        if "muon" not in args.optimizer:
            yield (
                f"parallax: --optimizer {args.optimizer}: the paper (arXiv 2605.29157) finds that Muon unlocks the gains of "
                "Parallax: consider --optimizer muon, which needs the package emerging_optimizers."
            )

    def build(self, config: ParallaxConfig, query: Tensor, key: Tensor, place: Place) -> Layer:
        from megatron_lighthouse.parallax.layer import build

        how = (place.exchange, place.comm_type, place.scale)
        return Layer(build(query, key, *how, kernels=config.kernels), place.number)

    def check_installed(self, config: ParallaxConfig, inputs: Inputs, place: Place) -> None:
        from megatron_lighthouse.parallax.implementations import implementation_for

        implementation_for(config.kernels, inputs.device, inputs.dtype, inputs.dim)

    def sent(
        self, config: ParallaxConfig, seq_length: int, shape: Shape, layout: Layout, comm_type: str
    ) -> dict[str, tuple[int, int]]:
        """As dense attention's, and for the mean of the keys two sums in float64; by heads, r goes with the queries."""
        forward, backward = attend_bytes(comm_type, seq_length, shape, layout)
        if comm_type == "a2a":
            r = seq_length // layout.size * shape.batch * shape.heads * shape.dim * shape.itemsize
            more = r * (layout.size - 1) // layout.size
            forward, backward = forward + more, backward + more
        centre = 2 * 2 * shape.batch * shape.groups * shape.dim * FLOAT64 * (layout.size - 1)
        return {"attend": (forward, backward), "centre": (centre, 0)}


PARALLAX = Parallax()
