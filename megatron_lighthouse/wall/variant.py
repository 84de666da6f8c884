"""Wall as a variant: what Megatron's side, the plan and the scripts ask of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_lighthouse import running
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.variant import Place, Stream, Variant, beyond_softmax, shared_out_problem
from megatron_lighthouse.wall.config import WallConfig

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.sequence.documents import Documents
    from megatron_lighthouse.softmax import backends
    from megatron_lighthouse.softmax.documents import AttendDocuments
    from megatron_lighthouse.softmax.inputs import Inputs
    from megatron_lighthouse.wall.layer import Attend
    from megatron_lighthouse.wall.pieces import Sight


@dataclass(frozen=True)
class Layer:
    """A layer in its place in the model."""

    attend: Attend
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
            return self.attend(query, key, value, gate, scalar[0] if scalar else None, sinks), None


@dataclass(frozen=True)
class OverDocuments:
    """The same over the documents of a row, which each call brings."""

    config: WallConfig
    place: Place

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
        documents: Documents,
        attend: AttendDocuments | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        from megatron_lighthouse.wall.pieces import Sight

        bounds = [0]
        for length in documents.lengths:
            bounds.append(bounds[-1] + length)
        made = _made(self.config, query, key, self.place, Sight(tuple(bounds)))
        return Layer(made, self.place.number)(query, key, value, *streams, sinks=sinks)


class Wall(Variant):
    """Wall (Tilde Research, 2026): forget gates instead of positions."""

    name, title = "wall", "Wall"
    help = "lets keys fade by gates of each head and channel, linear_g, in place of positions"
    config = WallConfig
    streams = (
        Stream("g", rotated=False, bias=8.0),
        Stream("gs", rotated=False, bias=8.0, per_channel=False),
    )
    dense_weights = False
    position = "none"

    def streams_of(self, config: WallConfig) -> tuple[Stream, ...]:
        gate = Stream("g", rotated=False, bias=config.gate_bias, per_group=config.tied_gates)
        scalar = Stream("gs", rotated=False, bias=config.gate_bias, per_channel=False)
        return (gate, scalar) if config.scalar_gate else (gate,)

    def problems(self, config: WallConfig, model: Any) -> Iterator[str]:
        yield from self.dropout_problems(model.attention_dropout)
        for option in beyond_softmax(model):
            yield f"{option} is not done by --attention {self.name}: leave it out, or use --attention dense."
        groups, ranks = model.num_query_groups or model.num_attention_heads, model.tensor_model_parallel_size
        if message := shared_out_problem("--num-query-groups", groups, ranks):
            yield message

    def position_problems(self, config: WallConfig, kind: str | None) -> Iterator[str]:
        if kind not in (None, self.position):
            why = "RoPE would rotate linear_g too" if kind in ("rope", "yarn", "mrope") else "the gates take their place"
            yield f"--position-embedding-type {kind} does not go with --attention {self.name}, for {why}: use none."

    def document_problems(self, config: WallConfig, ranks: int) -> Iterator[str]:
        if ranks > 1:
            yield (
                f"--dataloader-inter-document-masking with --context-parallel-size {ranks} is done by dense attention alone: "
                "use --context-parallel-size 1, or --attention dense."
            )

    def remarks(self, config: WallConfig, args: Any) -> Iterator[str]:
        each = math.log1p(math.exp(-config.gate_bias))
        yield (
            f"wall: --wall-gate-bias {config.gate_bias:g}: at first a channel fades to 1/e in {1 / each:,.0f} tokens, and to "
            f"{math.exp(-each * args.seq_length):.2g} over --seq-length {args.seq_length}."
        )

    def build(self, config: WallConfig, query: Tensor, key: Tensor, place: Place) -> Layer:
        return Layer(_made(config, query, key, place), place.number)

    def build_documents(self, config: WallConfig, query: Tensor, key: Tensor, place: Place) -> OverDocuments:
        return OverDocuments(config, place)

    def check_installed(self, config: WallConfig, inputs: Inputs, place: Place) -> None:
        from megatron_lighthouse.wall.implementations import makers_for

        makers_for(config.kernels, inputs.device, inputs.dtype, inputs.dim)

    def sent(
        self, config: WallConfig, seq_length: int, shape: Shape, layout: Layout, comm_type: str
    ) -> dict[str, tuple[int, int]]:
        from megatron_lighthouse.wall.sent import sent

        return sent(comm_type, seq_length, shape, layout, config.tied_gates, config.scalar_gate)


def _made(config: WallConfig, query: Tensor, key: Tensor, place: Place, sight: Sight | None = None) -> Attend:
    from megatron_lighthouse.wall.gates import LogSigmoid
    from megatron_lighthouse.wall.layer import build

    heads = key.shape[2] if config.tied_gates else query.shape[2]
    how = (place.exchange, place.comm_type, place.scale, sight, config.kernels, config.scalar_gate)
    return build(query, key, key, heads, *how, LogSigmoid(config.gate_max), LogSigmoid())


WALL = Wall()
