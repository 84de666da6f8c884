"""Dense attention, as Megatron has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_lighthouse.lighthouse.rows import RowAttention
from megatron_lighthouse.variant import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.context_parallel.ring import Passage


@dataclass(frozen=True, eq=False)  # for torch 2.11's compiler hashes what it calls, while it has no fields yet
class Rows:
    """Softmax attention over the rows of one rank."""

    attend: Callable[..., Tensor]
    """An `Attend`, or one that takes sinks too."""

    def passage(self) -> None:
        return None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor, passage: Passage | None = None) -> Tensor:
        return self.attend(query, key, value, *sinks)


class Dense(Variant):
    """Megatron's own core attention, of the layer spec that it would take anyway."""

    name, title = "dense", "dense attention"
    help = "is Megatron's own"
    native = counted = True
    around = "softmax"

    def build_rows(
        self,
        config: Any,
        inner: str,
        query: Tensor,
        key: Tensor,
        exchange: Exchange | None,
        comm_type: str,
        scale: float | None,
        sinks: bool = False,
        value_dim: int | None = None,
    ) -> RowAttention:
        from megatron_lighthouse.softmax.backends import inner_attention
        from megatron_lighthouse.softmax.sharded import sharded_attention
        from megatron_lighthouse.softmax.sinks import sinks_attention

        if exchange is None:
            return Rows((sinks_attention if sinks else inner_attention)(inner, query, key, scale, value_dim))
        return sharded_attention(inner, query, key, exchange, comm_type, scale, None, sinks, value_dim)

    def build_document_rows(
        self,
        config: Any,
        inner: str,
        query: Tensor,
        key: Tensor,
        scale: float | None,
        value_dim: int | None = None,
        sinks: bool = False,
    ) -> Callable[..., Tensor]:
        from megatron_lighthouse.softmax.documents import documents_attention

        return documents_attention(inner, query, key, scale, value_dim, None, sinks)


DENSE = Dense()
