"""The backward pass in two kernels: by tiles of queries, which sum dq and dr, and by tiles of keys, which sum dk and dv.

With e = 1 + t̄ - u, b = dO·v̄, c = dO·C = b - dO·o and a = dO·v: the gradients of logits are p (c + e (a - b)), those of u
-p (a - b), and dv is the sum of p e dO. The first kernel writes what the second needs of a query: log-sum-exp, 1 + t̄, b and c.
The second sums over the query heads of a key/value head in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, strides
from megatron_lighthouse.kernels.parallax.keys import keys_kernel
from megatron_lighthouse.kernels.parallax.queries import queries_kernel
from megatron_lighthouse.kernels.parallax.tiles import blocks_of, constants_of, in_bulk, on_hopper


def backward(
    grad: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    averages: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
    scale: float,
    window: int | None,
    causal: bool,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dr, dk and dv in the inputs' dtype; arguments as `forward` takes and gives them, of whole rows.

    Args:
        bounds: [n] int32 each, of the document of each token where it starts, and where it ends.
    """
    rows, batch, heads, dim = near[0].shape
    query, r, key, value, grad = (last_contiguous(x) for x in (*near, *far, grad))
    of_value, output = (last_contiguous(x) for x in averages[:2])
    mean = averages[2]
    dq, dr, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, r, key, value))
    starts, ends = (lse, lse) if bounds is None else bounds  # which are not read then
    shape = (rows, key.shape[0], heads, heads // key.shape[2])
    tiles = {name: blocks_of(name, dim, query.element_size(), on_hopper(query)) for name in ("queries", "keys")}
    padded_rows = cdiv(rows, tiles["queries"].queries) * tiles["queries"].queries  # of which tiles of queries in both are parts
    terms = lse.new_empty(batch, heads, 4, padded_rows, dtype=torch.float32)
    blocks = tiles["queries"]
    tensors = [query, r, key, value, grad, of_value, output, mean, lse, dq, dr]
    enqueue(
        queries_kernel,
        (cdiv(rows, blocks.queries) * batch * heads, 1, 1),
        [*tensors, terms, starts],
        (*(strides(x) for x in tensors), *shape, padded_rows),
        constants_of(dim, scale, window, causal, blocks, bounds is not None, in_bulk(key, value)),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    blocks = tiles["keys"]
    tensors = [query, r, key, value, grad, dk, dv]
    enqueue(
        keys_kernel,
        (cdiv(key.shape[0], blocks.keys) * batch * key.shape[2], 1, 1),
        [*tensors, terms, ends],
        (*(strides(x) for x in tensors), *shape, padded_rows),
        constants_of(dim, scale, window, causal, blocks, bounds is not None),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return dq, dr, dk, dv
