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
    if cu_seqlens is not None:
        rows, lengths = key.detach().double(), cu_seqlens.diff().long()
        total, squares = (_of_documents(x, cu_seqlens) for x in (rows, rows.square()))
        mean = _mean(total, squares, lengths.clamp(min=1).view(-1, 1, 1, 1), key.dtype)
        return key - mean.repeat_interleave(lengths, 0, output_size=len(key))
    if exchange is None:
        total, squares = _sums(key.detach(), 0)
        return key - _mean(total, squares, key.shape[0], key.dtype)
    # chunk by chunk in the order of the sequence, so that all ranks have the same bits
    of_chunks = torch.stack(_sums(key.detach().unflatten(0, (2, -1)), 1), 1)
    total, squares = exchange.whole(of_chunks, "centre").sum(0)
    return key - _mean(total, squares, key.shape[0] * exchange.size, key.dtype)


PIECE = 256
"""Rows that a thread sums one after the other."""


def _of_documents(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sums of documents: of pieces first, so that a long one is summed by many. Asks the device nothing."""
    cuts = torch.cat([cu_seqlens.long(), torch.arange(0, len(x), PIECE, device=x.device)]).sort().values
    pieces = torch.segment_reduce(x, "sum", lengths=cuts.diff(), initial=0, unsafe=True)
    each = torch.searchsorted(cuts, cu_seqlens.long()).diff()
    return torch.segment_reduce(pieces, "sum", lengths=each, initial=0, unsafe=True)


def _sums(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of the elements and of their squares along `dim`, without a copy of `x` in float64."""
    return x.sum(dim, dtype=torch.float64), torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64).square()


def _mean(total: Tensor, squares: Tensor, count: int | Tensor, dtype: torch.dtype) -> Tensor:
    """What is subtracted."""
    mean = total / count
    return mean.where(mean.square() > squares / count - mean.square(), 0).to(dtype)
