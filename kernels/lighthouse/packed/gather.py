"""Gather over packed documents: as `kernels.lighthouse.gather`, one launch each way for all documents.

Values of another width than keys take a second one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import Launch, cdiv, enqueue, last_contiguous, launch, new_rows, padded, strides
from megatron_lighthouse.kernels.lighthouse.gather import NOT_TURNED, head_of
from megatron_lighthouse.kernels.lighthouse.windows import collect, spread
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.ranges import profiled

COUNTS = ["documents", "units", "tokens", "windows", "pyramid_length"]
"""Numbers that change from row to row."""


@triton.jit(repr=lambda _: "lighthouse_packed_gather_forward", do_not_specialize=COUNTS)
def packed_gather_forward_kernel(
    p_q,
    p_k,
    p_v,
    p_rows_q,
    p_rows_k,
    p_rows_v,
    p_places,
    p_documents,
    p_turns,
    strides_q,
    strides_k,
    strides_v,
    strides_rows_q,
    strides_rows_k,
    strides_rows_v,
    H,
    G,
    documents,
    units,
    tokens,
    windows,
    pyramid_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    TURN: tl.constexpr,
    PAIRS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Program (block of units, head of Q, K or V)."""
    heads = H + 2 * G
    p_x, stride_x, i_g = head_of(p_q, p_k, p_v, strides_q, strides_k, strides_v, H, heads, 0, G, G)
    p_rows, stride_rows, _ = head_of(
        p_rows_q, p_rows_k, p_rows_v, strides_rows_q, strides_rows_k, strides_rows_v, H, heads, 0, G, G
    )
    p_map, is_turned = p_places + i_g * pyramid_length, tl.program_id(1) < H + G
    strides = stride_x, stride_rows, 0
    packed = p_documents, documents, units, tokens, windows
    collect(
        p_x,
        p_map,
        p_rows,
        p_rows,
        p_turns,
        *strides,
        0,
        0,
        0,
        0,
        is_turned,
        D,
        BLOCK_D,
        P,
        L,
        BLOCK,
        0,
        True,
        False,
        TURN,
        PAIRS,
        BEFORE,
        packed,
        True,
    )


@triton.jit(repr=lambda _: "lighthouse_packed_gather_backward", do_not_specialize=COUNTS)
def packed_gather_backward_kernel(
    p_rows_q,
    p_rows_k,
    p_rows_v,
    p_q,
    p_k,
    p_v,
    p_places,
    p_documents,
    p_turns,
    strides_rows_q,
    strides_rows_k,
    strides_rows_v,
    strides_q,
    strides_k,
    strides_v,
    H,
    G,
    documents,
    units,
    tokens,
    windows,
    pyramid_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    TURN: tl.constexpr,
    PAIRS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Program (block of windows of level 1, head of Q, K or V)."""
    heads = H + 2 * G
    p_rows, stride_rows, i_g = head_of(
        p_rows_q, p_rows_k, p_rows_v, strides_rows_q, strides_rows_k, strides_rows_v, H, heads, 0, G, G
    )
    p_x, stride_x, _ = head_of(p_q, p_k, p_v, strides_q, strides_k, strides_v, H, heads, 0, G, G)
    p_map, is_turned = p_places + i_g * pyramid_length, tl.program_id(1) < H + G
    strides = stride_rows, stride_x, 0
    packed = p_documents, documents, units, tokens, windows
    spread(
        p_rows,
        p_map,
        p_x,
        p_rows,
        p_turns,
        *strides,
        0,
        0,
        0,
        0,
        is_turned,
        D,
        BLOCK_D,
        P,
        L,
        BLOCK,
        0,
        True,
        False,
        TURN,
        PAIRS,
        BEFORE,
        packed,
        True,
    )


def launch_packed(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    packing: Packing,
    parts: int,
    heads: tuple[int, int, int],
    how: Launch,
    **constants: int,
) -> None:
    """Launch a kernel of gather or scatter over documents.

    Args:
        tensors: [·, 1, ·, D], as the kernel takes them.
        tables: places, and what else it reads behind the documents' table.
        parts: lanes for each unit.
        heads: over which the grid runs; H; G.
    """
    grid, query_heads, groups = heads
    tensors = tuple(map(last_contiguous, tensors))
    dim, (places, *others) = tensors[0].shape[3], tables
    counts = (packing.bounds.shape[1], packing.units, packing.seq_length, sum(packing.windows), places.shape[2])
    shape = {"D": dim, "BLOCK_D": padded(dim), "P": packing.pooling, "L": packing.levels, "BLOCK": how.rows}
    enqueue(
        kernel,
        (cdiv(packing.units * parts, how.rows), grid, 1),
        [*tensors, places, packing.unit_table, *others],
        (*map(strides, tensors), query_heads, groups, *counts),
        {**shape, **constants},
        num_warps=how.warps,
    )


class PackedGather(torch.autograd.Function):
    """(query, key, value, selection, rotary) -> rows. Keeps only the map and the documents for backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, selection: Selection, rotary: Rotary | None) -> Any:
        ctx.selection, ctx.rotary = selection, rotary
        rows = tuple(new_rows(x, selection.length) for x in (query, key, value))
        with profiled("gather"):
            _launch(packed_gather_forward_kernel, (query, key, value, *rows), selection, rotary, "collect")
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens = tuple(new_rows(x, ctx.selection.geometry.seq_length) for x in grads)
        with profiled("gather backward"):
            _launch(packed_gather_backward_kernel, (*grads, *tokens), ctx.selection, ctx.rotary, "spread")
        return *tokens, None, None


def _launch(kernel: Any, tensors: tuple[Tensor, ...], selection: Selection, rotary: Rotary | None, step: str) -> None:
    packing, (query, key, value, *_) = selection.geometry, tensors
    assert isinstance(packing, Packing)
    parts = 1 if step == "collect" else packing.pooling ** (packing.levels - 2)
    turns = selection.places if rotary is None else rotary.turns(packing.rule.window, query.device)
    pairing = NOT_TURNED if rotary is None else rotary.pairing
    heads, groups, tables = query.shape[2], key.shape[2], (selection.places, turns)
    given = [(tensors, (heads + 2 * groups, heads, groups), pairing)]
    if value.shape[3] != key.shape[3]:  # values alone, as queries of as many heads as groups
        values = (value,) * 3 + (tensors[5],) * 3
        given = [(tensors, (heads + groups, heads, groups), pairing), (values, (groups, groups, groups), NOT_TURNED)]
    for of, grid, (turn, pairs, before) in given:
        how = launch(step, of[0].shape[3], query.element_size())
        launch_packed(kernel, of, tables, packing, parts, grid, how, TURN=turn, PAIRS=pairs, BEFORE=before)
