"""Exchange: the collectives of context parallelism, and how many bytes a rank sends in them.

Every rank of the group calls the same methods in the same order. Tensors travel in their own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.context_parallel.copies import Copies, copies_over
from megatron_lighthouse.sequence.layout import Layout

sent: dict[str, int] = {}
"""Bytes that this process has sent to other ranks, by purpose, but for what graphs repeat: what a variant's plan is held to."""


class Parcel(Protocol):
    """Tensors under way to this rank."""

    def open(self) -> list[Tensor]:
        """The tensors: the host waits for them on a CPU, the current stream on a GPU."""

    def close(self) -> None:
        """They have been read, or will be by what the current stream has been given: their memory is used anew."""


@dataclass(frozen=True)
class Exchange:
    """The context-parallel ranks of one sequence, as this rank talks to them."""

    group: dist.ProcessGroup
    layout: Layout

    @staticmethod
    def over(group: dist.ProcessGroup | None) -> Exchange | None:
        """The exchange over `group`; None where there is nobody to talk to."""
        if group is None or group.size() == 1:
            return None
        return Exchange(group, Layout(group.size(), group.rank()))

    @property
    def size(self) -> int:
        return self.layout.size

    @property
    def rank(self) -> int:
        return self.layout.rank

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        """[C, *x.shape]: the tensors of all ranks, which have one shape."""
        _count(purpose, x.nbytes * (self.size - 1))
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.14
        gather(out.flatten(0, 1) if x.dim() else out, x, group=self.group)
        return out

    def all_to_all(self, x: Tensor, purpose: str, to: Sequence[int] | None = None, by: Sequence[int] | None = None) -> Tensor:
        """`x` [rows, ...] cut along dimension 0, one piece for each rank, against the pieces that they have for this one.

        Args:
            to, by: rows for each rank, and from each; equal shares by default.
        """
        pieces = x.shape[0] // self.size if to is None else to[self.rank]
        _count(purpose, (x.shape[0] - pieces) * prod(x.shape[1:]) * x.element_size())
        out = x.new_empty(x.shape[0] if by is None else sum(by), *x.shape[1:])
        splits = (None if by is None else list(by), None if to is None else list(to))
        dist.all_to_all_single(out, x.contiguous(), *splits, group=self.group)
        return out

    def start(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], purpose: str
    ) -> list[dist.Work]:
        """Begin to send contiguous tensors to ranks of the group, and to receive into others; `finish` what it returns.

        Two ranks that send each other several tensors list them in the same order.
        """
        for x, _ in sends:
            _count(purpose, x.nbytes)
        operations = [dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer) for x, peer in receives]
        operations += [dist.P2POp(dist.isend, x, group=self.group, group_peer=peer) for x, peer in sends]
        return dist.batch_isend_irecv(operations) if operations else []

    def swap(
        self, tensors: Sequence[Tensor], hop: int, shapes: Sequence[torch.Size], purpose: str, channel: str, room: int
    ) -> Parcel:
        """Begin to send contiguous tensors to the rank `hop` places after this one (before it, where that is negative).

        What the rank as far on the other side sends comes as tensors of `shapes` and the same dtypes.

        Args:
            hop: 1 to C - 1 in turn in each pass, or -1 to 1 - C.
            channel: names passes of one direction. A rank has two messages open at most, and one where C is 2.
            room: bytes of the largest message, the same on all ranks.
        """
        if copies := self.copies(tensors[0].device):
            for x in tensors:
                _count(purpose, x.nbytes)
            return copies.send(channel, tensors, hop, shapes, room)
        to, by = ((self.rank + way) % self.size for way in (hop, -hop))
        received = [x.new_empty(shape) for x, shape in zip(tensors, shapes, strict=True)]
        works = self.start([(x, to) for x in tensors], [(x, by) for x in received], purpose)
        return _Received(received, works, tuple(tensors))

    def copies(self, device: torch.device) -> Copies | None:
        """What `swap` sends by from GPU to GPU; None where it leaves that to the process group."""
        copies = copies_over(self.group, device)
        return copies if isinstance(copies, Copies) else None

    def whole(self, x: Tensor, purpose: str) -> Tensor:
        """The whole sequence [C * n, ...], of which each rank gives its own tokens `x` [n, ...]."""
        return self.in_order(self.all_gather(x, purpose))

    def in_order(self, x: Tensor) -> Tensor:
        """`x` [C, n, ...] with the tokens of each rank, as one sequence [C * n, ...]."""
        chunks = x.unflatten(1, (2, -1)).flatten(0, 1)
        return torch.cat([chunks[place] for place in self.layout.order()])

    def out_of_order(self, x: Tensor) -> Tensor:
        """A whole sequence [C * n, ...] as the tokens of each rank [C, n, ...]: the way back from `in_order`."""
        chunks = x.unflatten(0, (2 * self.size, -1))
        order = [chunk for rank in range(self.size) for chunk in Layout(self.size, rank).chunks]
        return torch.cat([chunks[chunk] for chunk in order]).unflatten(0, (self.size, -1))

    def own(self, x: Tensor) -> Tensor:
        """This rank's tokens of a whole sequence `x` [N, ...]: [N / C, ...]."""
        chunks = x.unflatten(0, (2 * self.size, -1))
        return torch.cat([chunks[chunk] for chunk in self.layout.chunks])


@dataclass
class _Received:
    """A parcel that the process group brings."""

    tensors: list[Tensor]
    works: list[dist.Work]
    sent: tuple[Tensor, ...]
    """Kept until they have been sent."""

    def open(self) -> list[Tensor]:
        finish(self.works)
        return self.tensors

    def close(self) -> None:
        pass


def finish(works: Sequence[dist.Work]) -> None:
    """Wait until everything begun has arrived: the host on a CPU, the current stream on a GPU."""
    for work in works:
        work.wait()


def _count(purpose: str, size: int) -> None:
    sent[purpose] = sent.get(purpose, 0) + size
