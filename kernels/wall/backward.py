"""The backward pass: pairs within tiles, earlier tiles of keys, later tiles of queries, and the gates' suffix sums."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, strides
from megatron_lighthouse.kernels.wall.keys import keys_kernel
from megatron_lighthouse.kernels.wall.near import near_kernel
from megatron_lighthouse.kernels.wall.prepare import prepare
from megatron_lighthouse.kernels.wall.queries import queries_kernel
from megatron_lighthouse.kernels.wall.suffix import scalar_suffix_sums, suffix_sums
from megatron_lighthouse.kernels.wall.tiles import blocks_of, constants_of, near_constants


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    scalar_gate: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    first: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `megatron_lighthouse.wall.diagonal`."""
    rows, batch, heads, dim = query.shape
    query, key, value, gate, grad, out = (last_contiguous(x) for x in (query, key, value, gate, grad, out))
    first, ratio = first.contiguous(), heads // key.shape[2]
    widest = max(dim, value.shape[3])
    prepared = prepare(query, key, gate, blocks_of("prepare", widest, query.element_size()))
    sum_dq, sum_dk, sum_dv, sums = (_like(x, torch.float32) for x in (query, query, grad, query))
    dq, dk, dv = (_like(x, x.dtype) for x in (query, key, value))
    delta, scalar_sums = (torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device) for _ in range(2))
    scalar = gate if scalar_gate is None else scalar_gate

    def launch(name: str, kernel: object, tensors: list[Tensor], tables: list[Tensor], programs: int) -> None:
        blocks = blocks_of(name, widest, query.element_size())
        constants = constants_of(query, value, scale, scalar_gate is not None, blocks.rows)
        enqueue(
            kernel,
            (cdiv(rows, blocks.rows) * batch * programs, 1, 1),
            [*tensors, *tables],
            (*(strides(x) for x in tensors), rows, heads, ratio),
            near_constants(constants) if kernel is near_kernel else constants,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    tensors = [query, key, value, gate, scalar, grad, out, lse, sum_dq, sum_dk, sum_dv, sums, delta, scalar_sums]
    launch("near", near_kernel, tensors, [first], heads)
    shared = [value, gate, scalar, *prepared, grad, lse, delta]
    launch("queries", queries_kernel, [*shared, sum_dq, dq, sums, scalar_sums], [first], heads)
    tile = blocks_of("keys", widest, query.element_size()).rows
    last = torch.arange(tile - 1, rows + tile - 1, tile, device=first.device, dtype=first.dtype)
    ends = torch.searchsorted(first, last, right=True, out_int32=True)
    launch("keys", keys_kernel, [*shared, sum_dk, sum_dv, dk, dv, sums, scalar_sums], [first, ends], key.shape[2])

    dg = suffix_sums(sums, first)
    return dq, dk, dv, dg, None if scalar_gate is None else scalar_suffix_sums(scalar_sums, first)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of this shape, contiguous."""
    return torch.empty(x.shape, dtype=dtype, device=x.device)
