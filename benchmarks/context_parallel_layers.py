"""What the checks and the times of context parallelism have in common: inputs, shards, and Transformer Engine's attention."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.softmax.backends import Attend

HAS_TE = importlib.util.find_spec("transformer_engine") is not None and not os.environ.get("WITHOUT_TE")
if HAS_TE:
    import transformer_engine.pytorch  # noqa: F401  before torch loads its own cuDNN, with which it would clash

COMM_TYPES = ("p2p", "all_gather", "a2a")
_stream: list[torch.cuda.Stream] = []


def exchange_of(group: dist.ProcessGroup) -> Exchange:
    exchange = Exchange.over(group)
    assert exchange is not None, "needs more than one rank"
    return exchange


def shares_out(comm_type: str, heads: int, ranks: int) -> bool:
    """Whether a scheme can be tried: `a2a` shares out the key/value heads."""
    return comm_type != "a2a" or heads % ranks == 0


def inputs(length: int, batch: int, heads: int, groups: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and the gradient of the output, the same on every rank."""
    tensors = [torch.randn(length, batch, n, dim, device="cuda", dtype=dtype) for n in (heads, groups, groups, heads)]
    for x in tensors:
        dist.broadcast(x, 0)
    return tensors


def lighthouse(config: LighthouseConfig, **how: Any) -> Attend:
    """The layer with `config`, and `how` as `lighthouse_attention` takes it."""

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return lighthouse_attention(query, key, value, config, **how)

    return layer


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def both(layer: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output and the gradients of the inputs, behind which `tensors` have the output's."""
    *inputs, grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = layer(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def te_attention(group: dist.ProcessGroup | None, heads: int, groups: int, dim: int, comm_type: str = "p2p") -> Attend:
    """Transformer Engine's causal attention; over the shards of `group`, or over whole sequences."""
    from transformer_engine.pytorch import DotProductAttention

    layer = DotProductAttention(heads, dim, num_gqa_groups=groups, attention_dropout=0.0, attn_mask_type="causal").cuda()
    if group is not None:
        if not _stream:
            _stream.append(torch.cuda.Stream())
        layer.set_context_parallel_group(group, dist.get_process_group_ranks(group), _stream[0], comm_type)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = layer(query, key, value, qkv_format="sbhd")
        return out.unflatten(-1, query.shape[2:])

    return attend
