"""Products: what all queries and keys make with a row of their tile, and the maxima over windows; reads Q and K once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, launch, padded, run, strides
from megatron_lighthouse.kernels.lighthouse.score import blocks_of, coarsen, entry_of
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sequence.layout import Layout


@triton.jit
def _products_of(
    p_x, stride_token, stride_head, p_row, stride_tile, i_token, i_tile, m_token, R, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of R rows of D with the row of a token's tile, added up, [BLOCK]: in the order of `norms_of`, and made positive."""
    i_d = tl.arange(0, BLOCK_D)
    mask = m_token[:, None] & (i_d < D)[None, :]
    p_x += i_token.to(tl.int64)[:, None] * stride_token + i_d[None, :]
    row = tl.load(p_row + i_tile.to(tl.int64)[:, None] * stride_tile + i_d[None, :], mask=mask, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(R):
        x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32) * row
        width: tl.constexpr = BLOCK_D
        for halving in tl.static_range(16):
            if width >> halving > 1:
                left, right = tl.split(tl.reshape(x, [BLOCK, width >> (halving + 1), 2]))
                x = left + right
        total += tl.reshape(x, [BLOCK])
        p_x += stride_head
    return tl.where(total >= 0.0, 1.0 + total, tl.div_rn(1.0, tl.where(total >= 0.0, 1.0, 1.0 - total)))


@triton.jit(repr=lambda _: "lighthouse_mass_products", do_not_specialize=["first", "second", "length"])
def products_kernel(
    p_q,
    p_k,
    p_rows,
    p_scores,
    strides_q,
    strides_k,
    first,
    second,
    length,
    seq_length,
    coarse_length,
    tokens,
    tiles,
    G,
    R,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    L: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores [2, B, G, coarse length] of levels 1..FUSED, of rows [2, tiles, B, G, D]; programs as of `score_kernel`."""
    i_bg = tl.program_id(1)
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    i_token, m_token = entry_of(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), L - 1, P, P2)
    m_token &= i_token < seq_length
    i_tile = tl.where(i_token < length, first + i_token, second + i_token - length) // tokens
    stride_tile = tl.num_programs(1) * D
    p_rows += (tl.program_id(2) * tiles).to(tl.int64) * stride_tile + i_bg.to(tl.int64) * D
    if tl.program_id(2) == 0:
        p_x = p_q + i_b * strides_q[1] + i_g * R * strides_q[2]
        best = _products_of(
            p_x, strides_q[0], strides_q[2], p_rows, stride_tile, i_token, i_tile, m_token, R, D, BLOCK_D, BLOCK
        )
    else:
        p_x = p_k + i_b * strides_k[1] + i_g * strides_k[2]
        best = _products_of(p_x, strides_k[0], 0, p_rows, stride_tile, i_token, i_tile, m_token, 1, D, BLOCK_D, BLOCK)
    best = tl.where(m_token, best, -1.0)
    p_level = p_scores + (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + i_bg) * coarse_length
    for l in tl.static_range(1, FUSED + 1):
        best = tl.max(tl.reshape(best, [BLOCK // P2**l, P2]), 1)
        i_slot = tl.program_id(0) * (BLOCK // P2**l) + tl.arange(0, BLOCK // P2**l)
        i_entry, valid = entry_of(i_slot, L - 1 - l, P, P2)
        tl.store(p_level + i_entry, best, mask=valid & (i_entry < seq_length // P**l))
        p_level += seq_length // P**l


def products(query: Tensor, key: Tensor, for_query: Tensor, for_key: Tensor, pyramid: Pyramid, layout: Layout | None) -> Tensor:
    """See `mass_reference.products`."""
    starts, length = chunks_of(query.shape[0], layout, 1)
    tokens = pyramid.tile * pyramid.window(pyramid.levels - 1)
    made = torch.stack([for_query, for_key])
    return run(products_op, compute_products, query.detach(), key.detach(), made, pyramid.pyramid, [*starts, length, tokens])


def chunks_of(rows: int, layout: Layout | None, size: int) -> tuple[list[int], int]:
    """Where the first and the second chunk of a rank begin, of `rows` rows of `size` ranks, and their length."""
    length = rows // size if layout is None else rows // size // 2
    return ([0, 0] if layout is None else [chunk * length for chunk in layout.chunks]), length


def compute_products(query: Tensor, key: Tensor, rows: Tensor, sizes: Sequence[int], where: Sequence[int]) -> Tensor:
    """As `products`, of rows [2, tiles, B, G, D].

    Args:
        sizes: (N, L, p).
        where: the first tokens of two chunks, their length, and the tokens of a tile.
    """
    with profiled("mass"):
        pyramid = Pyramid(*sizes)
        query, key = last_contiguous(query), last_contiguous(key)
        scores = _empty(key, pyramid)
        (_, batch, heads, dim), groups = query.shape, key.shape[2]
        how = launch("score", dim, query.element_size())
        block, digit, fused = blocks_of(pyramid, how.rows)
        slots = pyramid.entries(pyramid.levels - 1) * digit ** (pyramid.levels - 1)
        shape = {"D": dim, "BLOCK_D": padded(dim), "P": pyramid.pooling, "P2": digit, "L": pyramid.levels}
        first, second, length, tokens = where
        enqueue(
            products_kernel,
            (cdiv(slots, block), batch * groups, 2),
            (query, key, rows.contiguous(), scores),
            (
                *(strides(x) for x in (query, key)),
                *(first, second, length, pyramid.seq_length, pyramid.coarse_length, tokens),
                *(rows.shape[1], groups, heads // groups),
            ),
            {**shape, "FUSED": fused, "BLOCK": block},
            num_warps=how.warps,
            enable_fp_fusion=False,  # as of the norms
        )
        if fused < pyramid.levels - 1:
            coarsen(scores, pyramid, fused)
        return scores


def _empty(key: Tensor, pyramid: Pyramid) -> Tensor:
    return torch.empty((2, *key.shape[1:3], pyramid.coarse_length), dtype=torch.float32, device=key.device)


products_op = torch.library.custom_op("lighthouse::mass_products", compute_products, mutates_args=())
products_op.register_fake(lambda query, key, rows, sizes, where: _empty(key, Pyramid(*sizes)))
