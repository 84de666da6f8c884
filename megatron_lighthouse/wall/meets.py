"""Which halves of a chunk meet, and their rows as batches: what lies alike is attended to at once. See `cut.halves`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lighthouse.wall.cut import Piece, halves
from megatron_lighthouse.wall.pieces import Sight


class Meet(NamedTuple):
    """Rows after an anchor and those before it that they see, of `times` anchors, twice `half` rows from one to the next."""

    half: int
    times: int
    anchor: int
    """The row after the first one."""
    later: int
    """Rows after each that see any before it."""
    earlier: int
    """Rows before each that they see."""
    near: int
    """Where the later half of the first lies among those of all `halves`, one after the other."""
    far: int
    """The earlier half likewise."""

    def of_later(self, x: Tensor) -> Tensor:
        """Of rows [n, B, heads, ·] of the chunk those after anchors, [later, times, B * heads, ·]."""
        return _batch(x, self.anchor, 2 * self.half, self.times, self.later)

    def of_earlier(self, x: Tensor) -> Tensor:
        """Those before."""
        return _batch(x, self.anchor - self.earlier, 2 * self.half, self.times, self.earlier)

    def of_near(self, x: Tensor) -> Tensor:
        """Likewise, of the later halves of all `halves`."""
        return _batch(x, self.near, self.half, self.times, self.later)

    def of_far(self, x: Tensor) -> Tensor:
        """Of the earlier halves."""
        return _batch(x, self.far + self.half - self.earlier, self.half, self.times, self.earlier)

    def of_lse(self, lse: Tensor) -> Tensor:
        """[B, heads, n] -> [times, B * heads, later], of the rows after anchors."""
        rows = lse.narrow(2, self.anchor, 2 * self.half * (self.times - 1) + self.later)
        return rows.unfold(2, self.later, 2 * self.half).permute(2, 0, 1, 3).flatten(1, 2)

    def hidden(self, window: int | None, device: torch.device) -> Tensor | None:
        """[later, earlier]: whom a row does not see; None: it sees all."""
        if window is None:
            return None
        after, before = torch.arange(self.later, device=device), torch.arange(self.earlier, 0, -1, device=device)
        return after.unsqueeze(1) + before >= window


@lru_cache(64)
def meets(rows: int, step: int, sight: Sight, begin: int) -> tuple[Meet, ...]:
    """Of a chunk of `rows` that begins with the token `begin`, in the order of `halves`."""
    found: list[Meet] = []
    near = far = 0
    for half, anchor, stop in halves(rows, step):
        first, end = sight.before(Piece(0, begin + anchor, slice(anchor, stop)))
        meet = Meet(half, 1, anchor, end - begin - anchor, min(half, begin + anchor - first), near, far)
        near, far = near + stop - anchor, far + half
        if meet.later <= 0 or meet.earlier <= 0:
            continue
        before = found[-1] if found else meet
        follows = before._replace(anchor=before.anchor + 2 * half * before.times)
        if found and follows[2:5] == meet[2:5] and before.half == half:
            found[-1] = before._replace(times=before.times + 1)
        else:
            found.append(meet)
    return tuple(found)


def _batch(x: Tensor, begin: int, apart: int, times: int, length: int) -> Tensor:
    """[length, times, B * heads, ·], a view where B and heads lie together."""
    rows = x.narrow(0, begin, apart * (times - 1) + length)
    return rows.unfold(0, length, apart).movedim(-1, 0).flatten(2, 3)
