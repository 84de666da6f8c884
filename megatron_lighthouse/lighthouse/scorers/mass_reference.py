"""What the `mass` scorer is made of, in plain PyTorch: what its kernels (`kernels.lighthouse.mass`) are held to.

Every product has a shape that the place in the sequence settles, and so one order: see `reference.attended_norms`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.reference import blocks_of, chunk_starts, window_maxima
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.base import scaled
from megatron_lighthouse.sums import accumulation_dtype, by_neighbours, one_by_one

BLOCK = 64
"""Rows, and keys, that are worked on at a time."""


@torch.no_grad()
@profiled("mass")
def rows(query: Tensor, key: Tensor, layout: Layout | None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row's logits over the keys before its own, and its greatest weight.

    Args:
        query: [n, B, H, D], the rows of the two chunks that `layout` gives a rank; all of the sequence where it is None.
        key: [C * n, B, G, D], the whole sequence in its order.
        scale: of the softmax; 1/sqrt(D) if None.

    Returns:
        Both [B, H, n], fp32 (fp64 for fp64): the first row sees no key, and has minus infinity and 0.
    """
    groups, found = key.shape[2], []
    kind, keys, begins = accumulation_dtype(query), key.permute(1, 2, 0, 3), chunk_starts(query.shape[0], layout)
    for first, block, own in blocks_of(query.chunk(len(begins)), begins, BLOCK):
        position = first + torch.arange(BLOCK, device=query.device)
        k = keys[:, :, : first + BLOCK].to(kind)
        q = block.to(kind).unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4).flatten(2, 3)
        logits = scaled(q @ k.mT, query, scale).unflatten(2, (-1, BLOCK))
        hidden = torch.arange(k.shape[2], device=query.device) >= position.unsqueeze(-1)
        logits = logits.masked_fill_(hidden, -torch.inf)
        lse = logits.logsumexp(-1)
        peak = (logits.amax(-1) - lse).exp().where(position > 0, 0)
        found.append(torch.stack([lse, peak]).flatten(2, 3)[..., own])
    lse, peak = torch.cat(found, -1)
    return lse, peak


@torch.no_grad()
@profiled("mass")
def columns(query: Tensor, key: Tensor, lse: Tensor, tile: int, layout: Layout | None, scale: float | None = None) -> Tensor:
    """How much weight each key gets from the later queries of its tile: [B, G, n], added up over a group's heads.

    Args:
        query: [n, B, H, D]; key: [n, B, G, D]; lse: [B, H, n], as `rows` gives it: all in tiles of `tile` rows from the first.
        layout: the rank whose keys are wanted, where not all are: other columns may hold anything.
        scale: as of `rows`.
    """
    (n, _, groups, _), kind = key.shape, accumulation_dtype(query)
    out = lse.new_zeros(*key.shape[1:3], n)
    for begin in range(0, n, tile):
        end = min(begin + tile, n)
        for first in range(begin, end, BLOCK):
            total: Tensor | None = None
            k = _block(key, first, end).to(kind).permute(1, 2, 3, 0)
            for start in range(first, end, BLOCK):
                q = _block(query, start, end).to(kind).unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4)
                logits = scaled(q.flatten(2, 3) @ k, query, scale).unflatten(2, (-1, BLOCK))
                least = _block(lse.movedim(-1, 0), start, end).movedim(0, -1).unflatten(1, (groups, -1))
                row, column = (x + torch.arange(BLOCK, device=key.device) for x in (start, first))
                seen = (row.unsqueeze(-1) > column) & (row < end).unsqueeze(-1)
                part = (logits - least.unsqueeze(-1)).masked_fill_(~seen, -torch.inf).exp().sum((2, 3))
                total = part if total is None else total + part
            assert total is not None
            out[..., first : min(first + BLOCK, end)] = total[..., : end - first]
    return out


@torch.no_grad()
@profiled("mass")
def finer(query: Tensor, key: Tensor, pooled: Tensor, mean: Tensor, pyramid: Pyramid, layout: Layout | None) -> Tensor:
    """Window maxima of two scores of each token: [2, B, G, coarse length], in the order of the concatenated pyramid.

    By its queries the squared distance from their window's pooled queries, added up over the group; by its key the product
    with the mean query of its tile, made positive in its order, for selection takes no negative scores. Sums are made in the
    order of `Steps.score`.

    Args:
        query: [n, B, H, D]; key: [n, B, G, D]: this rank's tokens.
        pooled: [n/F, B, H, D], of the same tokens.
        mean: [tiles, B, G, D] in a dtype of sums.
        layout: where tiles are numbered in the whole sequence; None: among these tokens.
    """
    kind, groups, begins = accumulation_dtype(query), key.shape[2], chunk_starts(query.shape[0], layout)
    window, n = pyramid.window(pyramid.levels - 1), query.shape[0] // len(begins)
    positions = torch.cat([begin + torch.arange(n, device=query.device) for begin in begins])
    apart = query.to(kind) - pooled.to(kind).repeat_interleave(window, 0)
    by_query = _sums(apart.square().unflatten(2, (groups, -1)))
    by_key = _sums((key.to(kind) * mean[positions // (pyramid.tile * window)]).unsqueeze(3))
    by_key = torch.where(by_key >= 0, 1 + by_key, 1 / (1 + by_key.abs()))
    return window_maxima(torch.stack([by_query, by_key]), pyramid)


def _sums(x: Tensor) -> Tensor:
    """[n, B, G, R, D] -> [B, G, n]: neighbours first, then neighbours of those, then head by head."""
    return one_by_one(by_neighbours(x, -1), 3).permute(1, 2, 0)


def _block(x: Tensor, first: int, end: int) -> Tensor:
    """BLOCK rows of x from `first` on, those from `end` on being zero."""
    rows = x[first : min(first + BLOCK, end)]
    return torch.nn.functional.pad(rows, (0, 0) * (x.dim() - 1) + (0, BLOCK - rows.shape[0]))
