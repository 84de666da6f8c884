"""A layer on several ranks, and on one to hold them to: inputs cut into zigzag shards, and the ranks' answers put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.attention import lighthouse_select
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.sharded import sharded_attention
from tests.oracle import Problem
from tests.ranks import run_ranks
from tests.steps import random_like, restride

Group = dist.ProcessGroup | None


def exchange_of(size: int, rank: int) -> Exchange:
    """An exchange that knows who it is and has nobody to talk to."""
    nobody: Any = None
    return Exchange(nobody, Layout(size, rank))


def shard(x: Tensor, size: int, rank: int) -> Tensor:
    """The two chunks of `rank`, one after the other."""
    chunks = x.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def whole(shards: Sequence[Tensor]) -> Tensor:
    """What `shard` does, undone."""
    halves = [x.chunk(2) for x in shards]
    return torch.cat([early for early, _ in halves] + [late for _, late in reversed(halves)])


def shards_of(group: Group, tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(tensors) if group is None else [shard(x, group.size(), group.rank()) for x in tensors]


def inputs_of(problem: Problem, dtype: str = "float64") -> list[Tensor]:
    """Whole q, k and v, and a gradient for the output."""
    query, key, value = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in problem.arrays())
    return [query, key, value, *random_like([query])]


def layer(
    group: Group,
    inputs: Sequence[Tensor],
    config: LighthouseConfig,
    comm_type: str = "p2p",
    strides: str = "contiguous",
    identity: bool = False,
    scale: float | None = None,
    rotary: Rotary | None = None,
) -> list[Tensor]:
    """Output, gradients of q, k and v, and entries [S, B, G], of this rank's tokens; of all of them where there is no group.

    Args:
        inputs: whole, as `inputs_of` gives them.
        identity: the inner attention hands the query rows through, so that the layer is linear in the query.
    """
    query, key, value, grad = shards_of(group, inputs)
    query, key, value = (x.detach().requires_grad_() for x in restride(strides, query, key, value))
    attend = (lambda q, k, v: q) if identity else None
    how: dict[str, Any] = {"cp_group": group, "cp_comm_type": comm_type, "attend": attend, "softmax_scale": scale}
    how["rotary"] = rotary
    out = lighthouse_attention(query, key, value, config, **how)
    grad = restride(strides, grad, grad, grad)[0]
    grads = torch.autograd.grad(out, (query, key, value), grad, materialize_grads=True)
    entries = lighthouse_select(query, key, config, value=value, softmax_scale=scale, rotary=rotary, cp_group=group)
    return [out.detach(), *grads, entries.movedim(-1, 0)]


def deep(group: Group, inputs: Sequence[Tensor], config: LighthouseConfig, comm_type: str, how: str) -> list[Tensor]:
    """Output and gradients of two layers of which the second takes the first's output as its query, as a model trains them."""
    query, key, value, grad = shards_of(group, inputs)
    leaves = [
        x.detach().requires_grad_(i != 1 or how != "without a gradient of the keys") for i, x in enumerate((query, key, value))
    ]

    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return lighthouse_attention(query, key, value, config, cp_group=group, cp_comm_type=comm_type)

    def run(query: Tensor) -> Tensor:
        if how == "recomputed":
            return checkpoint(one, query, *leaves[1:], use_reentrant=False)
        if how == "recomputed, the old way":
            return checkpoint(one, query, *leaves[1:], use_reentrant=True)
        return one(query, *leaves[1:])

    with torch.no_grad():
        run(leaves[0])  # what an evaluation leaves behind must not be found by the backward
    out = run(run(leaves[0]))
    if how == "backward twice":
        out.backward(grad, retain_graph=True)
    out.backward(grad)
    return [out.detach(), *[x.new_zeros(x.shape) if x.grad is None else x.grad for x in leaves]]


def dense(group: dist.ProcessGroup, inputs: Sequence[Tensor], comm_type: str, scale: float | None) -> list[Tensor]:
    """Output and gradients of attention over shards, of this rank's tokens."""
    query, key, value, grad = shards_of(group, inputs)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    exchange = Exchange.over(group)
    assert exchange is not None
    out = sharded_attention("auto", query, key, exchange, comm_type, scale)(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def together(size: int, function: Callable[..., list[Tensor]], *args: Any) -> list[Tensor]:
    """What `function` gives on each of `size` ranks, as whole sequences."""
    return [whole(shards) for shards in zip(*run_ranks(size, function, *args), strict=True)]
