"""Centred keys: less the mean of their document and head, which changes no output and no gradient but by what is rounded.

Softmax and covariance do not see a vector that is added to all keys. The gradients of q and r are sums of weights, which
cancel, times keys: what rounding leaves of the weights is multiplied by the keys, and so by their mean. The mean carries no
gradient. Ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange


def centred(key: Tensor, exchange: Exchange | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """`key` less the mean over the tokens of all ranks, or of each document, of its batch element and head.

    A channel whose mean is less than its spread stays as it is, so that keys without a mean are not rounded again. The mean is
    rounded to the keys' dtype: of keys that lie close to it the difference is then exact (Sterbenz). Sums are in float64.

    Args:
        key: [n, B, G, D].
        exchange: the ranks that hold the tokens in zigzag order; all call this.
        cu_seqlens: [documents + 1], where each begins and the last ends. Not with `exchange`.
    """
    rows = key.detach().double()
    if cu_seqlens is None:
        count: int | Tensor = key.shape[0] * (exchange.size if exchange else 1)
        total, squares = (_sum(x, exchange) for x in (rows, rows.square()))
    else:
        lengths = cu_seqlens.diff().long()
        count = lengths.clamp(min=1).view(-1, 1, 1, 1)
        total, squares = (torch.segment_reduce(x, "sum", lengths=lengths, initial=0) for x in (rows, rows.square()))
    mean = total / count
    mean = mean.where(mean.square() > squares / count - mean.square(), 0).to(key.dtype)
    return key - (mean if cu_seqlens is None else mean.repeat_interleave(lengths, 0))


def _sum(x: Tensor, exchange: Exchange | None) -> Tensor:
    """[1, B, G, D], over the tokens of all ranks: chunk by chunk, so that all ranks have the same bits."""
    if exchange is None:
        return x.sum(0, keepdim=True)
    of_chunks = x.unflatten(0, (2, -1)).sum(1)
    return exchange.in_order(exchange.all_gather(of_chunks, "centre")).sum(0, keepdim=True)
