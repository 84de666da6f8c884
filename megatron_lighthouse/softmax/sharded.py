"""Softmax attention over shards: the scheme of `--cp-comm-type`, with queries near and keys and values far.

Rows that see a window alone are crossed in one way, whatever the scheme: see `context_parallel.windowed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.heads import share_of_heads
from megatron_lighthouse.context_parallel.parts import Scheme
from megatron_lighthouse.context_parallel.ring import Passage, Ring
from megatron_lighthouse.context_parallel.schemes import check_scheme, scheme
from megatron_lighthouse.context_parallel.windowed import Windowed
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.softmax.base import scale_of
from megatron_lighthouse.softmax.blocks import block_for
from megatron_lighthouse.softmax.sinks import sinks_attention


@dataclass(frozen=True)
class ShardedAttention:
    """An `Attend` over the rows of all ranks."""

    scheme: Scheme

    def passage(self) -> Passage | None:
        """Where it is a ring: the handle of one call."""
        return self.scheme.passage() if isinstance(self.scheme, Ring) else None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor, passage: Passage | None = None) -> Tensor:
        own = sinks[0] if sinks else None
        if isinstance(self.scheme, Ring):
            return self.scheme((query,), (key, value), own, passage)
        return self.scheme((query,), (key, value), own)


def sharded_attention(
    name: str,
    query: Tensor,
    key: Tensor,
    exchange: Exchange,
    comm_type: str,
    softmax_scale: float | None = None,
    *,
    window: int | None = None,
    sinks: bool = False,
    value_dim: int | None = None,
) -> ShardedAttention:
    """Causal attention over the rows of all ranks.

    Args:
        name: of the backend, as for `inner_attention`.
        query: [2s, B, H, D]; key: [2s, B, G, D]; of these only shapes, dtype and device count.
        comm_type: see `megatron_lighthouse.context_parallel.schemes.scheme`.
        window: rows before its own that a row sees; None: all.
        sinks: whether every call brings a sink for each head.
        value_dim: of the values, where it is not D.

    Raises:
        ValueError: a scheme that is not known, heads that 'a2a' cannot share out, or a backend that cannot do it.
    """
    scale = scale_of(query, softmax_scale)
    check_scheme(comm_type, query, key, exchange.size)
    if window is not None:
        return ShardedAttention(Windowed(block_for(name, query, key, scale, value_dim, window), exchange, window))

    def whole() -> Callable[..., Tensor]:
        q, k = (share_of_heads(x, exchange.size) for x in (query, key))
        attend = (sinks_attention if sinks else inner_attention)(name, q, k, scale, value_dim)
        return lambda near, far, *own: attend(*near, *far, *own)

    return ShardedAttention(scheme(comm_type, exchange, lambda: block_for(name, query, key, scale, value_dim), whole))
