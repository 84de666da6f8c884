"""Rows of D channels as tiles in registers: one tile, or two with a channel of each rotary pair in either, to turn them.

TURN is NONE, HALVES (pairs are channel i and PAIRS channels on) or NEIGHBOURS (pairs are channels 2i and 2i+1). BEFORE channels
stand before the rotated ones; what is not rotated is paired too, and turned by nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, HALVES, NEIGHBOURS = 0, 1, 2
_NONE, _HALVES, _NEIGHBOURS = tl.constexpr(NONE), tl.constexpr(HALVES), tl.constexpr(NEIGHBOURS)


@triton.jit
def channels(D: tl.constexpr, BLOCK_D: tl.constexpr, TURN: tl.constexpr, PAIRS: tl.constexpr, BEFORE: tl.constexpr):
    """(channels, whether they are there) of each of two tiles, and the rotary pair of each (none below 0, from PAIRS on)."""
    a = tl.arange(0, BLOCK_D // 2)
    if TURN != _HALVES:
        i_d = tl.arange(0, BLOCK_D)
        return i_d, i_d < D, i_d, i_d < D, a - BEFORE // 2
    elif D == 2 * PAIRS:
        return a, a < PAIRS, a + PAIRS, a < PAIRS, a
    else:
        rest: tl.constexpr = (D - 2 * PAIRS + 1) // 2
        is_pair, i_rest = a < PAIRS, a - PAIRS
        first = tl.where(is_pair, BEFORE + a, _unrotated(i_rest, PAIRS, BEFORE))
        second = tl.where(is_pair, BEFORE + PAIRS + a, _unrotated(i_rest + rest, PAIRS, BEFORE))
        # the pieces begin at multiples of this power of two, which the compiler cannot see
        pieces: tl.constexpr = PAIRS | BEFORE | rest | BLOCK_D // 2
        group: tl.constexpr = pieces & -pieces
        first = tl.max_contiguous(tl.multiple_of(first, group), group)
        second = tl.max_contiguous(tl.multiple_of(second, group), group)
        return first, is_pair | (i_rest < rest), second, is_pair | (i_rest + rest < D - 2 * PAIRS), a


@triton.jit
def _unrotated(i, PAIRS: tl.constexpr, BEFORE: tl.constexpr):
    """The channel of the i-th that is not rotated."""
    return tl.where(i < BEFORE, i, i + 2 * PAIRS)


@triton.jit
def zeros(BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr, TURN: tl.constexpr):
    """The tiles of COUNT sums, fp32."""
    if TURN == _NONE:
        return (tl.zeros([BLOCK, BLOCK_D], tl.float32),) * COUNT
    else:
        return (tl.zeros([BLOCK, BLOCK_D // 2], tl.float32),) * (2 * COUNT)


@triton.jit
def load(p_row, i_d, m_row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TURN: tl.constexpr):
    """The tiles of the rows at p_row [BLOCK, 1]; zero where m_row is not."""
    x = tl.load(p_row + i_d[0][None, :], mask=m_row & i_d[1][None, :], other=0.0)
    if TURN == _HALVES:
        return x, tl.load(p_row + i_d[2][None, :], mask=m_row & i_d[3][None, :], other=0.0)
    elif TURN == _NEIGHBOURS:
        first, second = tl.split(tl.reshape(x, (BLOCK, BLOCK_D // 2, 2)))
        return first, second
    else:
        return (x,)


@triton.jit
def store(p_row, x, i_d, m_row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TURN: tl.constexpr):
    """Write the tiles x to the rows at p_row [BLOCK, 1]."""
    kind = p_row.dtype.element_ty
    if TURN == _NEIGHBOURS:
        tile = tl.reshape(tl.join(x[0], x[1]), (BLOCK, BLOCK_D))
        tl.store(p_row + i_d[0][None, :], tile.to(kind), mask=m_row & i_d[1][None, :])
    else:
        tl.store(p_row + i_d[0][None, :], x[0].to(kind), mask=m_row & i_d[1][None, :])
        if TURN == _HALVES:
            tl.store(p_row + i_d[2][None, :], x[1].to(kind), mask=m_row & i_d[3][None, :])


@triton.jit
def add(x, y, TURN: tl.constexpr):
    """x + y in fp32."""
    if TURN == _NONE:
        return (x[0].to(tl.float32) + y[0].to(tl.float32),)
    else:
        return x[0].to(tl.float32) + y[0].to(tl.float32), x[1].to(tl.float32) + y[1].to(tl.float32)


@triton.jit
def scaled(x, factor: tl.constexpr, TURN: tl.constexpr):
    """x * factor in fp32."""
    if TURN == _NONE:
        return (x[0].to(tl.float32) * factor,)
    else:
        return x[0].to(tl.float32) * factor, x[1].to(tl.float32) * factor


@triton.jit
def turned(x, turns, p_pair, BACK: tl.constexpr, PAIRS: tl.constexpr):
    """The two tiles x turned on (or BACK) by the cosines and sines at p_pair [1 or BLOCK, 1], in fp32.

    Args:
        turns: the pair of each channel, and whether these rows are turned at all.
    """
    i_pair, is_turned = turns
    mask = ((i_pair >= 0) & (i_pair < PAIRS))[None, :] & is_turned
    p_pair += i_pair[None, :]
    cos, sin = tl.load(p_pair, mask=mask, other=1.0), tl.load(p_pair + PAIRS, mask=mask, other=0.0)
    if BACK:
        sin = -sin
    first, second = x[0].to(tl.float32), x[1].to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin
