"""A layer of Wall: what is decided of inputs' shapes, and the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_lighthouse.context_parallel.alone import WHOLE, Alone
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.heads import ByHeads
from megatron_lighthouse.context_parallel.parts import Tensors
from megatron_lighthouse.context_parallel.schemes import check_scheme, scheme
from megatron_lighthouse.lighthouse.transforms import refuse_transforms
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.softmax.base import scale_of
from megatron_lighthouse.sums import accumulation_dtype
from megatron_lighthouse.wall.blocks import Attention
from megatron_lighthouse.wall.cut import Cut, Step
from megatron_lighthouse.wall.implementations import earlier_for, makers_for
from megatron_lighthouse.wall.near import Near
from megatron_lighthouse.wall.pieces import Sight, first_rows
from megatron_lighthouse.wall.travel import Call, Decayed
from megatron_lighthouse.wall.within import Within

Gates = Callable[[Tensor], Tensor]
"""What makes gates of a stream: natural logarithms <= 0, in the dtype of sums."""


@dataclass(frozen=True, eq=False)  # as softmax.variant.Rows
class Layer:
    """Wall over the tokens of all ranks."""

    attention: Attention
    exchange: Exchange | None = None
    comm_type: str = "p2p"
    gates: Gates | None = None
    scalar_gates: Gates | None = None

    @profiled("attend")
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scalar_gate: Tensor | None, sink: Tensor | None
    ) -> Tensor:
        """See `wall_attention`; the scalar gate is [n, B, H, 1]. Gates are what `gates` and `scalar_gates` make of these."""
        return self.over_rows(query, key, value, gate, scalar_gate, sink)

    def over_rows(
        self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scalar_gate: Tensor | None, sink: Tensor | None
    ) -> Tensor:
        """The same, as a step of another attention, which has a name of its own in profiles; keys may have the gates' heads."""
        given = [x for x in (query, key, value, gate, scalar_gate, sink) if x is not None]
        refuse_transforms(*given, of="wall_attention")
        if self.exchange is None or self.comm_type != "a2a":
            return self._of_heads(query, key, value, gate, scalar_gate, sink)
        size, rank = self.exchange.size, self.exchange.rank
        own_sink = None if sink is None else sink.unflatten(0, (size, -1))[rank]

        def whole(near: Tensors, far: Tensors) -> Tensor:
            (query, gate, *scalar), (key, value) = near, far
            return self._of_heads(query, key, value, gate, scalar[0] if scalar else None, own_sink)

        near = (query, gate) if scalar_gate is None else (query, gate, scalar_gate)
        return ByHeads(whole, self.exchange)(near, (key, value))

    def _of_heads(
        self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scalar: Tensor | None, sink: Tensor | None
    ) -> Tensor:
        """Of the heads that are here: over the rows that are, or those of all ranks."""
        exchange = None if self.comm_type == "a2a" else self.exchange
        wide = accumulation_dtype(query)
        gate = self.gates(gate) if self.gates else gate.to(wide)
        if scalar is not None:
            scalar = self.scalar_gates(scalar) if self.scalar_gates else scalar.to(wide)
        if sink is not None:
            sink = sink.to(wide).view(1, 1, -1, 1).expand(*query.shape[:3], 1)
        call = Call()
        attention = replace(self.attention, scalar=scalar is not None, sink=sink is not None, call=call)
        near, far = Near(query, key, value, gate, scalar, sink).tensors, ()
        chunks = WHOLE.near if exchange is None else exchange.layout.chunks
        if exchange is not None:
            gates = (gate,) if scalar is None else (gate, scalar)
            decayed, *scalars = Decayed.apply(call, attention.decays, attention.cut.pieces(chunks), exchange, key, *gates)
            far = (decayed, value, *scalars)
        if exchange is None:
            return Alone(attention)(near, far)
        out = scheme(self.comm_type, exchange, lambda: attention, lambda: Alone(attention))(near, far)
        call.begin_anew_with(out)
        return out


def build(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_heads: int,
    exchange: Exchange | None = None,
    comm_type: str = "p2p",
    softmax_scale: float | None = None,
    sight: Sight | None = None,
    *,
    kernels: str = "auto",
    biased: bool = False,
    gates: Gates | None = None,
    scalar_gates: Gates | None = None,
) -> Layer:
    """The layer for inputs like these, of which shapes, dtype and device count; see `wall_attention`.

    Args:
        gate_heads: H, or G where the query heads of a group share gates.
        sight: of the tokens of all ranks.
        biased: whether there are scalar gates.

    Raises:
        ValueError: a scheme that is not known, heads that 'a2a' cannot share out, or kernels that are forced and cannot run.
    """
    size, sight = exchange.size if exchange else 1, sight or Sight()
    check_scheme(comm_type, query, key, size)
    scale = scale_of(query, softmax_scale)
    over_parts = exchange is not None and comm_type != "a2a"
    rows = len(query)
    cut = Cut(rows // 2 if over_parts else rows * size, Step.TOKENS)
    chunks = exchange.layout.chunks if exchange is not None and over_parts else WHOLE.near
    if exchange is not None and not over_parts:
        query, gate_heads = query[:, :, : query.shape[2] // size], gate_heads // size
    diagonal, decays = makers_for(kernels, query.device, query.dtype, (query.shape[-1], value.shape[-1]))
    earlier = earlier_for(query, value, gate_heads, scale, biased, sight.window is not None)
    step = Step.along(alike=not sight.bounds)
    within, first = (
        Within(decays, earlier, cut.chunk, step, sight),
        first_rows(Cut(cut.chunk, step), sight, chunks, query.device),
    )
    attention = Attention(diagonal, decays, earlier, scale, cut, within, sight, first)
    return Layer(attention, exchange, comm_type, gates, scalar_gates)
