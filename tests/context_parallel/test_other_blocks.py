"""The seam of the schemes: a block that is not softmax's, with two near tensors, three far ones and two averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.context_parallel import exchange as exchange_module
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.parts import Mask, Part, Tensors
from megatron_lighthouse.context_parallel.schemes import scheme
from tests.context_parallel.shards import shards_of, together
from tests.ranks import run_ranks
from tests.tolerances import assert_close

BATCH, HEADS, DIM = 2, 2, 4
SHAPES = (DIM, DIM, DIM, DIM, 1)
"""Last dimensions of q, r, k, v and the bias."""


class Biased:
    """o_i = (1 + E[r_i·k]) E[v], averages by softmax_j(q_i·k_j + b_j): near (q, r), far (k, v, b). [n, B, H, ·] each."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        (query, other), (key, value, bias) = near, far
        logits = self._logits(query, key, bias, mask)
        weights = logits.softmax(-1)
        mean = torch.einsum("bhnm,bhnm->nbh", weights, torch.einsum("nbhd,mbhd->bhnm", other, key)).unsqueeze(-1)
        return Part((torch.einsum("bhnm,mbhd->nbhd", weights, value), mean), logits.logsumexp(-1))

    def output(self, part: Part) -> Tensor:
        value, mean = part.averages
        return (1 + mean) * value

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        (query, other), (key, value, bias) = near, far
        mean_v, mean_u = part.averages
        weights = (self._logits(query, key, bias, mask) - part.lse.unsqueeze(-1)).exp()
        of_v, of_u = grad * (1 + mean_u), (grad * mean_v).sum(-1, keepdim=True)
        u = torch.einsum("nbhd,mbhd->bhnm", other, key)
        past_v = torch.einsum("nbhd,mbhd->bhnm", of_v, value) - self._rows((of_v * mean_v).sum(-1, keepdim=True))
        logits = weights * (past_v + self._rows(of_u) * (u - self._rows(mean_u)))
        us = weights * self._rows(of_u)
        d_query, d_other = (torch.einsum("bhnm,mbhd->nbhd", x, key) for x in (logits, us))
        d_key = torch.einsum("bhnm,nbhd->mbhd", logits, query) + torch.einsum("bhnm,nbhd->mbhd", us, other)
        d_value = torch.einsum("bhnm,nbhd->mbhd", weights, of_v)
        return (d_query, d_other), (d_key, d_value, logits.sum(2).permute(2, 0, 1).unsqueeze(-1))

    def _rows(self, x: Tensor) -> Tensor:
        """[n, B, H, 1] -> [B, H, n, 1]."""
        return x.permute(1, 2, 0, 3)

    def _logits(self, query: Tensor, key: Tensor, bias: Tensor, mask: Mask) -> Tensor:
        """By the tokens' places in the sequence, which the mask tells, and by nothing else."""
        logits = torch.einsum("nbhd,mbhd->bhnm", query, key) + bias.permute(1, 2, 3, 0)
        places = [self._places(chunks, len(x) // len(chunks)) for chunks, x in ((mask.near, query), (mask.far, key))]
        later = places[1] > places[0].unsqueeze(1)
        return logits.masked_fill(later, -torch.inf)

    def _places(self, chunks: tuple[int, ...], length: int) -> Tensor:
        return torch.cat([chunk * length + torch.arange(length) for chunk in chunks])


def formula(tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients on one rank, by autograd."""
    *leaves, grad = (x.clone().requires_grad_() for x in tensors)
    block, n = Biased(), len(grad)
    assert block._logits(*(leaves[i] for i in (0, 2, 4)), Mask((0,), (0,))).isinf().sum() == BATCH * HEADS * n * (n - 1) // 2
    out = block.output(block.forward((leaves[0], leaves[1]), (leaves[2], leaves[3], leaves[4]), Mask((0,), (0,))))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def over_ranks(group: dist.ProcessGroup, tensors: list[Tensor], comm_type: str) -> list[Tensor]:
    *leaves, grad = (x.requires_grad_() for x in shards_of(group, tensors))
    exchange = Exchange.over(group)
    assert exchange is not None

    def no_whole() -> Any:
        raise AssertionError("of 'a2a' alone")

    out = scheme(comm_type, exchange, Biased, no_whole)((leaves[0], leaves[1]), (leaves[2], leaves[3], leaves[4]))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def by_heads(group: dist.ProcessGroup, tensors: list[Tensor]) -> list[Tensor]:
    *leaves, grad = (x.requires_grad_() for x in shards_of(group, tensors))
    exchange = Exchange.over(group)
    assert exchange is not None

    def no_block() -> Any:
        raise AssertionError("not of 'a2a'")

    def whole(near: Tensors, far: Tensors) -> Tensor:
        return Biased().output(Biased().forward(near, far, Mask((0,), (0,))))

    out = scheme("a2a", exchange, no_block, lambda: whole)((leaves[0], leaves[1]), (leaves[2], leaves[3], leaves[4]))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def inputs(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(tokens, BATCH, HEADS, n, generator=generator, dtype=torch.float64) for n in (*SHAPES, DIM)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather"])
def test_another_block_over_ranks_equals_one_rank(comm_type: str, size: int) -> None:
    tensors = inputs(6 * size)
    for found, expected in zip(together(size, over_ranks, tensors, comm_type), formula(tensors), strict=True):
        assert_close(found, expected, "ranks float64")


def test_another_attention_by_heads_equals_one_rank() -> None:
    tensors = inputs(12)
    for found, expected in zip(together(2, by_heads, tensors), formula(tensors), strict=True):
        assert_close(found, expected, "ranks float64")


def sent_by(group: dist.ProcessGroup, tensors: list[Tensor], comm_type: str) -> int:
    exchange_module.sent.clear()
    over_ranks(group, tensors, comm_type)
    return exchange_module.sent["attend"]


def test_near_tensors_stay() -> None:
    """Of 24 tokens, what a rank of 2 sends in forward and backward: far rows of 9 numbers alone, and their gradients."""
    row = BATCH * HEADS * (DIM + DIM + 1) * 8
    assert run_ranks(2, sent_by, inputs(24), "p2p") == [(6 + 6 + 12) * row, (12 + 12 + 6) * row]
