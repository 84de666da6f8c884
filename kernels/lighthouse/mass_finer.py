"""The finer levels of the mass scorer: what tokens make with a row of their window or tile, and the maxima over windows.

Reads Q and K once, as `score` does, and adds up in its order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, launch, padded, run, strides
from megatron_lighthouse.kernels.lighthouse.score import blocks_of, coarsen, entry_of, window_maxima
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sequence.layout import Layout


@triton.jit
def _sums(
    p_x,
    strides_x,
    p_row,
    strides_row,
    i_token,
    i_row,
    m_token,
    R,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """Of R rows of D: the squares of the differences from R others, or the products with these, added up: [BLOCK]."""
    i_d = tl.arange(0, BLOCK_D)
    mask = m_token[:, None] & (i_d < D)[None, :]
    p_x += i_token.to(tl.int64)[:, None] * strides_x[0] + i_d[None, :]
    p_row += i_row.to(tl.int64)[:, None] * strides_row[0] + i_d[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(R):
        x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        row = tl.load(p_row, mask=mask, other=0.0).to(tl.float32)
        x = (x - row) * (x - row) if SQUARES else x * row
        width: tl.constexpr = BLOCK_D
        for halving in tl.static_range(16):
            if width >> halving > 1:
                left, right = tl.split(tl.reshape(x, [BLOCK, width >> (halving + 1), 2]))
                x = left + right
        total += tl.reshape(x, [BLOCK])
        p_x += strides_x[2]
        p_row += strides_row[2]
    return total


@triton.jit(repr=lambda _: "lighthouse_mass_finer", do_not_specialize=["first", "second", "length"])
def finer_kernel(
    p_q,
    p_k,
    p_pooled,
    p_mean,
    p_scores,
    strides_q,
    strides_k,
    strides_pooled,
    strides_mean,
    first,
    second,
    length,
    seq_length,
    coarse_length,
    tokens,
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
    """Scores [2, B, G, coarse length] of levels 1..FUSED; programs as of `score_kernel`. A tile has so many `tokens`."""
    i_bg = tl.program_id(1)
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    i_token, m_token = entry_of(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), L - 1, P, P2)
    m_token &= i_token < seq_length
    if tl.program_id(2) == 0:
        p_x = p_q + i_b * strides_q[1] + i_g * R * strides_q[2]
        p_window = p_pooled + i_b * strides_pooled[1] + i_g * R * strides_pooled[2]
        i_window = i_token // P ** (L - 1)
        best = _sums(p_x, strides_q, p_window, strides_pooled, i_token, i_window, m_token, R, D, BLOCK_D, BLOCK, True)
    else:
        p_x = p_k + i_b * strides_k[1] + i_g * strides_k[2]
        p_tile = p_mean + i_b * strides_mean[1] + i_g * strides_mean[2]
        i_tile = tl.where(i_token < length, first + i_token, second + i_token - length) // tokens
        best = _sums(p_x, strides_k, p_tile, strides_mean, i_token, i_tile, m_token, 1, D, BLOCK_D, BLOCK, False)
        best = tl.where(best >= 0.0, 1.0 + best, tl.div_rn(1.0, 1.0 + tl.abs(best)))
    p_level = p_scores + (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + i_bg) * coarse_length
    window_maxima(p_level, tl.where(m_token, best, -1.0), seq_length, P, P2, L, FUSED, BLOCK)


def finer(query: Tensor, key: Tensor, pooled: Tensor, mean: Tensor, pyramid: Pyramid, layout: Layout | None) -> Tensor:
    """See `mass_reference.finer`."""
    where = [*chunks_of(query.shape[0], layout, 1), pyramid.tile * pyramid.window(pyramid.levels - 1)]
    return run(finer_op, compute_finer, query.detach(), key.detach(), pooled, mean, pyramid.pyramid, where)


def chunks_of(rows: int, layout: Layout | None, size: int) -> tuple[int, int, int]:
    """Where the first and the second chunk of a rank begin, of `rows` rows of `size` ranks, and their length."""
    if layout is None:
        return 0, 0, rows
    length = rows // size // 2
    early, late = layout.chunks
    return early * length, late * length, length


def compute_finer(
    query: Tensor, key: Tensor, pooled: Tensor, mean: Tensor, sizes: Sequence[int], where: Sequence[int]
) -> Tensor:
    """As `finer`.

    Args:
        sizes: (N, L, p).
        where: the first tokens of two chunks, their length, and the tokens of a tile.
    """
    with profiled("mass"):
        pyramid = Pyramid(*sizes)
        query, key, pooled, mean = (last_contiguous(x) for x in (query, key, pooled, mean))
        scores = _empty(key, pyramid)
        (_, batch, heads, dim), groups = query.shape, key.shape[2]
        how = launch("score", dim, query.element_size())
        block, digit, fused = blocks_of(pyramid, how.rows)
        slots = pyramid.entries(pyramid.levels - 1) * digit ** (pyramid.levels - 1)
        shape = {"D": dim, "BLOCK_D": padded(dim), "P": pyramid.pooling, "P2": digit, "L": pyramid.levels}
        *chunks, tokens = where
        tensors = (query, key, pooled, mean)
        enqueue(
            finer_kernel,
            (cdiv(slots, block), batch * groups, 2),
            (*tensors, scores),
            (
                *(strides(x) for x in tensors),
                *(*chunks, pyramid.seq_length, pyramid.coarse_length, tokens, groups, heads // groups),
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


finer_op = torch.library.custom_op("lighthouse::mass_finer", compute_finer, mutates_args=())
finer_op.register_fake(lambda query, key, pooled, mean, sizes, where: _empty(key, Pyramid(*sizes)))
