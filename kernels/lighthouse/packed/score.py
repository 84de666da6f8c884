"""Score over packed documents: as `kernels.lighthouse.score`, of the tokens in windows, which are found by a table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, launch, padded, strides
from megatron_lighthouse.kernels.lighthouse.score import blocks_of, coarsen, entry_of, norms_of, window_maxima
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.ranges import profiled


@triton.jit(repr=lambda _: "lighthouse_packed_score", do_not_specialize=["compact_length", "coarse_length"])
def packed_score_kernel(
    p_q,
    p_k,
    p_scores,
    p_starts,
    strides_q,
    strides_k,
    G,
    R,
    compact_length,
    coarse_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    L: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores [2, 1, G, coarse length] of levels 1..FUSED; program (tokens, g, 0 for Q and 1 for K). `p_starts`: the first
    token of each coarsest window."""
    i_g = tl.program_id(1).to(tl.int64)
    i_compact, m_token = entry_of(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), L - 1, P, P2)
    m_token &= i_compact < compact_length
    i_token = tl.load(p_starts + i_compact // P ** (L - 1), mask=m_token, other=0) + i_compact % P ** (L - 1)
    if tl.program_id(2) == 0:
        best = norms_of(p_q + i_g * R * strides_q[2], strides_q[0], strides_q[2], i_token, m_token, R, D, BLOCK_D, BLOCK)
    else:
        best = norms_of(p_k + i_g * strides_k[2], strides_k[0], 0, i_token, m_token, 1, D, BLOCK_D, BLOCK)
    p_level = p_scores + (tl.program_id(2).to(tl.int64) * G + i_g) * coarse_length
    window_maxima(p_level, tl.where(m_token, best, -1.0), compact_length, P, P2, L, FUSED, BLOCK)


def compute_packed_scores(query: Tensor, key: Tensor, packing: Packing) -> Tensor:
    """See `PackedSteps.score`."""
    with profiled("score"):
        query, key, compact = last_contiguous(query), last_contiguous(key), packing.compact
        (_, _, heads, dim), groups = query.shape, key.shape[2]
        scores = torch.empty((2, 1, groups, packing.coarse_length), dtype=torch.float32, device=key.device)
        how = launch("score", dim, query.element_size())
        block, digit, fused = blocks_of(compact, how.rows)
        slots = compact.entries(compact.levels - 1) * digit ** (compact.levels - 1)
        shape = {"D": dim, "BLOCK_D": padded(dim), "P": compact.pooling, "P2": digit, "L": compact.levels}
        enqueue(
            packed_score_kernel,
            (cdiv(slots, block), groups, 2),
            (query, key, scores, packing.window_starts),
            (strides(query), strides(key), groups, heads // groups, compact.seq_length, packing.coarse_length),
            {**shape, "FUSED": fused, "BLOCK": block},
            num_warps=how.warps,
            enable_fp_fusion=False,  # as for one sequence
        )
        if fused < compact.levels - 1:
            coarsen(scores, compact, fused)
        return scores
