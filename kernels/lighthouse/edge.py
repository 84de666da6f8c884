"""Edge: the rows of the last entries of each chunk, which spill into the next one, taken out or added to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import enqueue, last_contiguous, padded, strides
from megatron_lighthouse.kernels.lighthouse.windows import level_offset


@triton.jit(repr=lambda _: "lighthouse_edge")
def edge_kernel(
    p_rows,
    p_edge,
    p_places,
    strides_rows,
    strides_edge,
    length,
    chunks,
    pyramid_length,
    H,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    ADD: tl.constexpr,
):
    """Program (chunk, b * H + h): edge[chunk, l - 1] = rows[place] or zero; where ADD, rows[place] += edge[chunk, l - 1]."""
    i_chunk = tl.program_id(0)
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    p_rows += i_b * strides_rows[1] + i_h * strides_rows[2]
    p_edge += i_b * strides_edge[1] + i_h * strides_edge[2]
    p_places += (i_b * G + i_h // (H // G)) * pyramid_length
    i_d = tl.arange(0, BLOCK_D)
    for l in tl.static_range(1, L):
        i_row = tl.load(p_places + chunks * level_offset(length, l, P) + (i_chunk + 1) * (length // P**l) - 1)
        p_row = p_rows + i_row.to(tl.int64) * strides_rows[0] + i_d
        p_part = p_edge + (i_chunk * (L - 1) + l - 1) * strides_edge[0] + i_d
        m_row = (i_d < D) & (i_row >= 0)
        x = tl.load(p_row, mask=m_row, other=0.0)
        if ADD:
            x = x.to(tl.float32) + tl.load(p_part, mask=m_row, other=0.0).to(tl.float32)
            tl.store(p_row, x.to(p_rows.dtype.element_ty), mask=m_row)
        else:
            tl.store(p_part, x, mask=i_d < D)


def edge(rows: Tensor, places: Tensor, sizes: Sequence[int]) -> Tensor:
    """[chunks, L-1, B, H, D] of rows [S, B, H, D]; `sizes` is (N, L, p, S, chunks). See `lighthouse.sharded.halo.edge`."""
    rows = last_contiguous(rows)
    edges = torch.empty((sizes[4], sizes[1] - 1, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    _launch(rows, edges, places, sizes, add=False)
    return edges


def add_edge(rows: Tensor, edges: Tensor, places: Tensor, sizes: Sequence[int]) -> None:
    """Add edges to rows, in place; both have a contiguous last dimension. See `lighthouse.sharded.halo.add_edge`."""
    _launch(rows, edges, places, sizes, add=True)


def _launch(rows: Tensor, edges: Tensor, places: Tensor, sizes: Sequence[int], add: bool) -> None:
    (_, batch, heads, dim), (length, levels, pooling, _, chunks) = rows.shape, sizes
    edges = edges.flatten(0, 1)
    enqueue(
        edge_kernel,
        (chunks, batch * heads, 1),
        (rows, edges, places),
        (strides(rows), strides(edges), length // chunks, chunks, places.shape[2], heads, places.shape[1]),
        {"D": dim, "BLOCK_D": padded(dim), "P": pooling, "L": levels, "ADD": add},
        num_warps=1,
    )
