"""Softmax attention over shards: the scheme of `--cp-comm-type`, with queries near and keys and values far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.parts import Scheme, Tensors
from megatron_lighthouse.context_parallel.ring import Passage, Ring
from megatron_lighthouse.context_parallel.schemes import comm_type_problem, scheme
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.softmax.blocks import block_for


@dataclass(frozen=True)
class ShardedAttention:
    """An `Attend` over the rows of all ranks."""

    scheme: Scheme

    def passage(self) -> Passage | None:
        """Where it is a ring: the handle of one call."""
        return self.scheme.passage() if isinstance(self.scheme, Ring) else None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *_: Tensor, passage: Passage | None = None) -> Tensor:
        if isinstance(self.scheme, Ring):
            return self.scheme((query,), (key, value), passage)
        return self.scheme((query,), (key, value))


def sharded_attention(
    name: str, query: Tensor, key: Tensor, exchange: Exchange, comm_type: str, softmax_scale: float | None = None
) -> ShardedAttention:
    """Causal attention over the rows of all ranks.

    Args:
        name: of the backend, as for `inner_attention`.
        query: [2s, B, H, D]; key: [2s, B, G, D]; of these only shapes, dtype and device count.
        comm_type: see `megatron_lighthouse.context_parallel.schemes.scheme`.

    Raises:
        ValueError: a scheme that is not known, heads that 'a2a' cannot share out, or a backend that cannot do it.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    if problem := comm_type_problem(comm_type, query.shape[2], key.shape[2], exchange.size):
        raise ValueError(problem)

    def whole() -> Callable[[Tensors, Tensors], Tensor]:
        q, k = (x[:, :, : x.shape[2] // exchange.size] for x in (query, key))
        attend = inner_attention(name, q, k, scale)
        return lambda near, far: attend(*near, *far)

    return ShardedAttention(scheme(comm_type, exchange, lambda: block_for(name, query, key, scale), whole))
