"""Tiles of rows, and which pairs of tokens a tile of them may leave out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import LOG2_E, padded


class Blocks(NamedTuple):
    """Queries and keys that a program holds at a time, its warps, and how many tiles are under way."""

    queries: int
    keys: int
    warps: int
    stages: int


def blocks_of(kernel: str, dim: int, itemsize: int, hopper: bool) -> Blocks:
    """By D, the dtype and whether the GPU is a Hopper alone, for the kernel 'forward', 'queries' or 'keys'.

    Queries of a tile of 'queries' are a multiple of those of 'keys'. fp32 is multiplied without tensor cores.
    """
    wide = padded(dim)
    if itemsize == 4:
        return Blocks(16, 16, 4, 1)
    if hopper and wide <= 128:  # timed on an H200
        if kernel == "forward":
            return Blocks(64, 64, 4, 2 if wide == 128 else 3)
        if kernel == "queries":
            return Blocks(128, 64, 8, 3) if wide == 128 else Blocks(64, 64, 4, 3)
        return Blocks(64, 128, 8, 2) if wide == 128 else Blocks(64, 64, 4, 2)
    if kernel == "forward":
        return Blocks(128, 64, 8, 2) if wide <= 128 else Blocks(64, 32, 8, 2)
    if kernel == "queries":
        return Blocks(64, 32 if wide == 128 else 64, 8 if wide == 128 else 4, 2) if wide <= 128 else Blocks(32, 32, 8, 1)
    return Blocks(32, 64, 8, 2) if wide <= 128 else Blocks(32, 32, 8, 1)


def on_hopper(x: Tensor) -> bool:
    """Whether it lies on a GPU of compute capability 9."""
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] == 9


def in_bulk(*tensors: Tensor) -> bool:
    """Whether Hopper's bulk copy engine loads tiles of rows of all of these."""
    return on_hopper(tensors[0]) and hasattr(tl, "make_tensor_descriptor") and all(map(apart, tensors))


def apart(x: Tensor) -> bool:
    """Whether its rows, of 2-byte elements, lie multiples of 16 bytes apart, as that engine needs."""
    return x.element_size() == 2 and x.data_ptr() % 16 == 0 and all(n > 0 and n % 8 == 0 for n in x.stride()[:3])


def constants_of(
    dim: int, scale: float, window: int | None, causal: bool, blocks: Blocks, documents: bool = False, bulk: bool | None = None
) -> dict[str, int | float]:
    """The constants of a kernel, in its order. SCALE is of exponents of 2; WINDOW 0: none; BULK where it has a choice."""
    own: dict[str, int | float] = {"SCALE": scale * LOG2_E, "WINDOW": window or 0, "DOCUMENTS": documents, "CAUSAL": causal}
    own |= {} if bulk is None else {"BULK": bulk}
    return {**own, "D": dim, "BLOCK_D": padded(dim), "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys}


@triton.jit
def tile(p_x, stride, i_row, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] of rows of D channels, which are contiguous; what lies outside is 0."""
    i_d = tl.arange(0, BLOCK_D)
    p_x += i_row.to(tl.int64)[:, None] * stride + i_d[None, :]
    if D < BLOCK_D:
        x = tl.load(p_x, mask=(i_row < rows)[:, None] & (i_d < D)[None, :], other=0.0)
    else:
        x = tl.load(p_x, mask=(i_row < rows)[:, None], other=0.0)
    return x


@triton.jit
def source(p_x, stride, rows, BULK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """What `loaded` takes tiles of BLOCK rows from: a descriptor for the bulk copy engine, or the pointer."""
    if BULK:
        return tl.make_tensor_descriptor(p_x, [rows, D], [stride.to(tl.int64), 1], [BLOCK, BLOCK_D])
    else:
        return p_x


@triton.jit
def loaded(x, stride, i_first, rows, BULK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, BLOCK_D] from row i_first on; what lies outside is 0."""
    if BULK:
        return x.load([i_first, 0])
    else:
        return tile(x, stride, i_first + tl.arange(0, BLOCK), rows, D, BLOCK_D)


@triton.jit
def put(p_x, stride, i_row, rows, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The way back."""
    i_d = tl.arange(0, BLOCK_D)
    p_x += i_row.to(tl.int64)[:, None] * stride + i_d[None, :]
    tl.store(p_x, x.to(p_x.dtype.element_ty), mask=(i_row < rows)[:, None] & (i_d < D)[None, :])


@triton.jit
def first_seen(p_starts, i_m, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The first key that a query i_m sees, by its window (0: none) and its document, of which `p_starts` has the first token.

    Neither falls from a query to the next, on which `keys_of` goes.
    """
    low = i_m * 0
    if DOCUMENTS:
        low = tl.load(p_starts + i_m)
    if WINDOW:
        low = tl.maximum(low, i_m - WINDOW + 1)
    return low


@triton.jit
def last_seeing(p_ends, i_n, rows, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Likewise the first query, of all behind it, that does not see a key i_n; `p_ends` has its document's end."""
    high = i_n * 0 + rows
    if DOCUMENTS:
        high = tl.load(p_ends + i_n)
    if WINDOW:
        high = tl.minimum(high, i_n + WINDOW)
    return high


@triton.jit
def seen(i_m, i_n, low, keys, CAUSAL: tl.constexpr):
    """Which keys i_n each query i_m sees, along dimensions of their own, from `low` on."""
    visible = (i_n < keys) & (i_n >= low)
    if CAUSAL:
        visible = visible & (i_n <= i_m)
    return visible


@triton.jit
def keys_of(i_first, low, low_last, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(begin, whole, masked, end) of the keys that a tile of queries sees: all its queries see those from whole to masked.

    The first query sees none before `low`, the last none before `low_last`.
    """
    end = keys
    masked = keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(i_first + BLOCK_M, keys)
        masked = tl.minimum(i_first + 1, keys) // BLOCK_N * BLOCK_N
    begin = low // BLOCK_N * BLOCK_N
    whole = tl.minimum((low_last + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
    whole = tl.maximum(whole, begin)
    masked = tl.maximum(masked, whole)
    return begin, whole, masked, end
