"""Lighthouse's rows for Wall: decayed keys, and the gates between rows; a coarsest window is one walk over its tokens.

Forward a sum of keys is decayed by each token's gate and takes its key, for every level; it is a row's where a window ends. The
gates since the last row are a row's where one is gathered. Backward the gradients of these sums walk back, and meet the sums
that a first walk left at the start of each window of level 1. So exponents are gates: none is positive, and no sum of gates is
a difference.

In profiles they are a part of gather, by their names. Names: p_ pointers, i_ indices, m_ masks; sums are in fp32. Windows that
are not there have tokens of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import Launch, cdiv, enqueue, last_contiguous, launch, padded, strides


@triton.jit
def _tile(p_x, stride, i_row, m_row, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK, BLOCK_K] fp32 of rows of a head; 0 where m_row is not."""
    i_k = tl.arange(0, BLOCK_K)
    p_x += i_row.to(tl.int64)[:, None] * stride + i_k[None, :]
    return tl.load(p_x, mask=m_row[:, None] & (i_k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _unit(p_x, stride, i_first, m_row, P: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tiles of the P rows from i_first on, loaded before anything is stored, for which they would wait."""
    tiles = ()
    for c in tl.static_range(P):
        tiles += (_tile(p_x, stride, i_first + c, m_row, K, BLOCK_K),)
    return tiles


@triton.jit
def _put(p_x, stride, i_row, m_row, x, K: tl.constexpr, BLOCK_K: tl.constexpr):
    i_k = tl.arange(0, BLOCK_K)
    p_x += i_row.to(tl.int64)[:, None] * stride + i_k[None, :]
    tl.store(p_x, x.to(p_x.dtype.element_ty), mask=m_row[:, None] & (i_k < K)[None, :])


@triton.jit
def _program(windows, BLOCK: tl.constexpr):
    """Heads of the whole grid, this program's, and its coarsest windows."""
    heads = tl.num_programs(0) // ((windows + BLOCK - 1) // BLOCK)
    i_window = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    return heads, (tl.program_id(0) % heads).to(tl.int64), i_window


@triton.jit
def _place(p_map, tokens, windows, i_window, i_unit, LEVEL: tl.constexpr, P: tl.constexpr, L: tl.constexpr):
    """The row of the window of LEVEL that ends with unit i_unit of each coarsest window; -1 where none does, or is gathered."""
    p_level = p_map + tokens
    for l in tl.static_range(1, LEVEL):
        p_level += windows * P ** (L - 1 - l)
    ends = (i_window < windows) & ((i_unit + 1) % P ** (LEVEL - 1) == 0)
    return tl.load(p_level + i_window * P ** (L - 1 - LEVEL) + i_unit // P ** (LEVEL - 1), mask=ends, other=-1)


@triton.jit
def _rows_of(p_map, begin, tokens, windows, i_window, i_unit, P: tl.constexpr, L: tl.constexpr):
    """The rows of a unit's tokens, and of the windows that end with it, by level; likewise."""
    rows = ()
    for c in tl.static_range(P):
        rows += (tl.load(p_map + begin + i_unit * P + c, mask=i_window < windows, other=-1),)
    for l in tl.static_range(1, L):
        rows += (_place(p_map, tokens, windows, i_window, i_unit, l, P, L),)
    return rows


@triton.jit(repr=lambda _: "lighthouse_gather_forward_decayed", do_not_specialize=["tokens", "windows", "entries"])
def gather_kernel(
    p_k,
    p_gate,
    p_rows,
    p_row_gates,
    p_places,
    p_begin,
    strides_k,
    strides_gate,
    strides_rows,
    strides_row_gates,
    tokens,
    windows,
    entries,
    H,
    R,
    SHARE,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program b * H + h, of a gate's head, of each BLOCK coarsest windows; R of these heads share a key, SHARE a selection."""
    _, i_head, i_window = _program(windows, BLOCK)
    i_b, i_h, m_window = i_head // H, i_head % H, i_window < windows
    p_k += i_b * strides_k[1] + i_h // R * strides_k[2]
    p_gate += i_b * strides_gate[1] + i_h * strides_gate[2]
    p_rows += i_b * strides_rows[1] + i_h * strides_rows[2]
    p_row_gates += i_b * strides_row_gates[1] + i_h * strides_row_gates[2]
    p_map = p_places + i_head // SHARE * entries
    begin = tl.load(p_begin + i_window, mask=m_window, other=0)
    since = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    sums = (since,) * (L - 1)
    for i_unit in range(P ** (L - 2)):
        keys = _unit(p_k, strides_k[0], begin + i_unit * P, m_window, P, K, BLOCK_K)
        gates = _unit(p_gate, strides_gate[0], begin + i_unit * P, m_window, P, K, BLOCK_K)
        own = _rows_of(p_map, begin, tokens, windows, i_window, i_unit, P, L)
        for c in tl.static_range(P):
            k, g, i_row = keys[c], gates[c], own[c]
            since += g
            _put(p_rows, strides_rows[0], i_row, i_row >= 0, k, K, BLOCK_K)
            _put(p_row_gates, strides_row_gates[0], i_row, i_row >= 0, since, K, BLOCK_K)
            since = tl.where((i_row >= 0)[:, None], 0.0, since)
            decay = tl.exp(g)
            decayed = ()
            for l in tl.static_range(L - 1):
                decayed += (sums[l] * decay + k,)
            sums = decayed
        carried = ()
        for l in tl.static_range(1, L):
            i_row = own[P + l - 1]
            _put(p_rows, strides_rows[0], i_row, i_row >= 0, sums[l - 1] * (1.0 / P**l), K, BLOCK_K)
            _put(p_row_gates, strides_row_gates[0], i_row, i_row >= 0, since, K, BLOCK_K)
            since = tl.where((i_row >= 0)[:, None], 0.0, since)
            carried += (tl.where((i_unit + 1) % P ** (l - 1) == 0, 0.0, sums[l - 1]),)
        sums = carried


@triton.jit(repr=lambda _: "lighthouse_gather_backward_decayed", do_not_specialize=["tokens", "windows", "entries"])
def gather_backward_kernel(
    p_k,
    p_gate,
    p_grad,
    p_grad_gates,
    p_dk,
    p_dg,
    p_sums,
    p_places,
    p_begin,
    strides_k,
    strides_gate,
    strides_grad,
    strides_grad_gates,
    strides_dk,
    strides_dg,
    tokens,
    windows,
    entries,
    H,
    R,
    SHARE,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Likewise. p_sums: [L - 2, windows of level 1, B * H, K], what earlier units of its window have at each unit's start."""
    heads, i_head, i_window = _program(windows, BLOCK)
    i_b, i_h, m_window = i_head // H, i_head % H, i_window < windows
    UNITS: tl.constexpr = P ** (L - 2)
    p_k += i_b * strides_k[1] + i_h // R * strides_k[2]
    p_gate += i_b * strides_gate[1] + i_h * strides_gate[2]
    p_grad += i_b * strides_grad[1] + i_h * strides_grad[2]
    p_grad_gates += i_b * strides_grad_gates[1] + i_h * strides_grad_gates[2]
    p_dk += i_b * strides_dk[1] + i_h * strides_dk[2]
    p_dg += i_b * strides_dg[1] + i_h * strides_dg[2]
    p_sums += i_head * K
    stride_sums = heads * K
    p_map = p_places + i_head // SHARE * entries
    begin = tl.load(p_begin + i_window, mask=m_window, other=0)
    zero = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    if L > 2:
        sums = (zero,) * (L - 1)
        for i_unit in range(UNITS):
            keys = _unit(p_k, strides_k[0], begin + i_unit * P, m_window, P, K, BLOCK_K)
            gates = _unit(p_gate, strides_gate[0], begin + i_unit * P, m_window, P, K, BLOCK_K)
            for l in tl.static_range(2, L):
                i_sum = ((l - 2) * windows + i_window) * UNITS + i_unit
                _put(p_sums, stride_sums, i_sum, m_window, sums[l - 1], K, BLOCK_K)
            for c in tl.static_range(P):
                decayed = ()
                for l in tl.static_range(L - 1):
                    decayed += (sums[l] * tl.exp(gates[c]) + keys[c],)
                sums = decayed
            carried = ()
            for l in tl.static_range(1, L):
                carried += (tl.where((i_unit + 1) % P ** (l - 1) == 0, 0.0, sums[l - 1]),)
            sums = carried
        tl.debug_barrier()
    later = (zero,) * (L - 1)  # of level L - 1 first: the gradients of sums at the start of the unit after this one
    i_row = tl.zeros([BLOCK], tl.int32) - 1
    for i in range(UNITS):
        i_unit = UNITS - 1 - i
        keys = _unit(p_k, strides_k[0], begin + i_unit * P, m_window, P, K, BLOCK_K)
        gates = _unit(p_gate, strides_gate[0], begin + i_unit * P, m_window, P, K, BLOCK_K)
        decays, whole = (), zero + 1.0
        for c in tl.static_range(P):
            decays += (tl.exp(gates[c]),)
            whole = whole * decays[c]
        at_end, earlier, carried = zero, zero, ()
        for l in tl.static_range(L - 1, 0, -1):
            i_own = _place(p_map, tokens, windows, i_window, i_unit, l, P, L)
            i_row = tl.where(i_own >= 0, i_own, i_row)
            grad = _tile(p_grad, strides_grad[0], i_own, i_own >= 0, K, BLOCK_K) * (1.0 / P**l)
            grad += tl.where((i_unit + 1) % P ** (l - 1) == 0, 0.0, later[L - 1 - l])
            at_end += grad
            at_start = grad * whole
            if l > 1:
                i_sum = ((l - 2) * windows + i_window) * UNITS + i_unit
                earlier += at_start * _tile(p_sums, stride_sums, i_sum, m_window, K, BLOCK_K)
            carried += (at_start,)
        later = carried
        pairs, of_rows, own = (), (), ()
        for c in tl.static_range(P - 1, -1, -1):
            i_own = tl.load(p_map + begin + i_unit * P + c, mask=m_window, other=-1)
            i_row = tl.where(i_own >= 0, i_own, i_row)
            own += (_tile(p_grad, strides_grad[0], i_own, i_own >= 0, K, BLOCK_K),)
            of_rows += (_tile(p_grad_gates, strides_grad_gates[0], i_row, i_row >= 0, K, BLOCK_K),)
        for c in tl.static_range(P - 1, -1, -1):
            _put(p_dk, strides_dk[0], begin + i_unit * P + c, m_window, own[P - 1 - c] + at_end, K, BLOCK_K)
            pairs += (keys[c] * at_end,)
            at_end = at_end * decays[c]
        for c in tl.static_range(P):
            i_token = begin + i_unit * P + c
            _put(p_dg, strides_dg[0], i_token, m_window, earlier + of_rows[P - 1 - c], K, BLOCK_K)
            earlier += pairs[P - 1 - c]


class Windows(NamedTuple):
    """What is gathered, of tokens that form coarsest windows."""

    places: Tensor
    """[B, selections, entries] int32, contiguous: see `Selection`."""
    begin: Tensor
    """[windows] int32: the first token of each."""
    tokens: int
    """Entries of level 0."""
    rows: int
    """S."""
    levels: int
    pooling: int


def gather(key: Tensor, gate: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """[S, B, heads, K] of decayed keys, in their dtype, and of gates, fp32. Rows of tokens in no window are not written."""
    key, gate = last_contiguous(key), last_contiguous(gate)
    rows, row_gates = (torch.empty(windows.rows, *gate.shape[1:], dtype=x.dtype, device=x.device) for x in (key, gate))
    _launch(gather_kernel, [key, gate, rows, row_gates], [], windows, gate, key.shape[2])
    return rows, row_gates


def gather_backward(key: Tensor, gate: Tensor, grad: Tensor, grad_gates: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Of the keys, [n, B, heads, K], in fp32 where several heads share one, and of the gates; likewise."""
    key, gate, grad, grad_gates = (last_contiguous(x) for x in (key, gate, grad, grad_gates))
    kind = key.dtype if gate.shape[2] == key.shape[2] else torch.float32
    dk, dg = (torch.empty(gate.shape, dtype=dtype, device=key.device) for dtype in (kind, gate.dtype))
    units = windows.begin.shape[0] * windows.pooling ** (windows.levels - 2)
    sums = torch.empty(max(1, windows.levels - 2), units, *gate.shape[1:], dtype=torch.float32, device=key.device)
    _launch(gather_backward_kernel, [key, gate, grad, grad_gates, dk, dg], [sums], windows, gate, key.shape[2])
    return dk, dg


def _launch(
    kernel: object, tensors: Sequence[Tensor], others: Sequence[Tensor], windows: Windows, gate: Tensor, keys: int
) -> None:
    _, batch, heads, dim = gate.shape
    how, count, places = launch_of(dim, windows.pooling), windows.begin.shape[0], windows.places.contiguous()
    enqueue(
        kernel,
        (cdiv(count, how.rows) * batch * heads, 1, 1),
        [*tensors, *others, places, windows.begin],
        (
            *(strides(x) for x in tensors),
            *(windows.tokens, count, places.shape[2], heads, heads // keys, heads // places.shape[1]),
        ),
        constants(dim, windows.levels, windows.pooling, how),
        num_warps=how.warps,
    )


def launch_of(dim: int, pooling: int) -> Launch:
    """Windows of a program, and its warps: as rows that are spread, in fp32; of which a program holds p tokens backward."""
    how = launch("spread", dim, 4)
    return how._replace(rows=how.rows >> (pooling > 4) >> (pooling > 8))


def constants(dim: int, levels: int, pooling: int, how: Launch) -> dict[str, int]:
    """In the kernels' order."""
    return {"K": dim, "BLOCK_K": padded(dim), "P": pooling, "L": levels, "BLOCK": how.rows}
