"""Dense attention, as Megatron has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lighthouse.lighthouse.rows import RowAttention
from megatron_lighthouse.variant import Place, Variant

if TYPE_CHECKING:
    from torch import Tensor

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
    native = counted = copies_groups = True
    around = "softmax"

    def build_rows(self, inner: str, query: Tensor, key: Tensor, place: Place) -> RowAttention:
        from megatron_lighthouse.softmax.backends import inner_attention
        from megatron_lighthouse.softmax.sharded import sharded_attention
        from megatron_lighthouse.softmax.sinks import sinks_attention

        if place.exchange is None:
            of_one_rank = sinks_attention if place.sinks else inner_attention
            return Rows(of_one_rank(inner, query, key, place.scale, place.value_dim))
        how = (inner, query, key, place.exchange, place.comm_type, place.scale)
        return sharded_attention(*how, sinks=place.sinks, value_dim=place.value_dim)

    def build_document_rows(self, inner: str, query: Tensor, key: Tensor, place: Place) -> Callable[..., Tensor]:
        from megatron_lighthouse.softmax.documents import documents_attention

        return documents_attention(inner, query, key, place.scale, value_dim=place.value_dim, sinks=place.sinks)


DENSE = Dense()
