"""How a tensor of Megatron is put together from tensors of a Hugging Face model, and taken apart again.

`join` and `split` are inverse to each other, and move rows alone: no number changes. Both work on meta tensors, so shapes
need no formula of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

type Sizes = Mapping[str, int]
"""A model's sizes by name: hidden, heads, groups, …"""


class Form(Protocol):
    """One way to put a tensor together."""

    def join(self, tensors: Sequence[Tensor], sizes: Sizes, out: Tensor | None = None) -> Tensor:
        """Hugging Face's tensors -> Megatron's, in the memory of `out` where it is given and rows must move."""

    def split(self, tensor: Tensor, rows: Sequence[int], sizes: Sizes) -> list[Tensor]:
        """Megatron's tensor -> Hugging Face's, which have so many `rows` each (their first axis)."""


class One:
    """The same tensor."""

    def join(self, tensors: Sequence[Tensor], sizes: Sizes, out: Tensor | None = None) -> Tensor:
        return tensors[0]

    def split(self, tensor: Tensor, rows: Sequence[int], sizes: Sizes) -> list[Tensor]:
        return [tensor]


class Stacked:
    """The rows of one after those of the other: gate, then up."""

    def join(self, tensors: Sequence[Tensor], sizes: Sizes, out: Tensor | None = None) -> Tensor:
        return torch.cat([*tensors], out=out)

    def split(self, tensor: Tensor, rows: Sequence[int], sizes: Sizes) -> list[Tensor]:
        return [*tensor.split([*rows])]


class Grouped:
    """q, k, v [rows, …] -> for each key/value head: the rows of its queries, of its key, of its value."""

    def join(self, tensors: Sequence[Tensor], sizes: Sizes, out: Tensor | None = None) -> Tensor:
        by_group = [t.reshape(sizes["groups"], -1, *t.shape[1:]) for t in tensors]
        grouped = None if out is None else out.unflatten(0, (sizes["groups"], -1))
        return torch.cat(by_group, dim=1, out=grouped).flatten(0, 1)

    def split(self, tensor: Tensor, rows: Sequence[int], sizes: Sizes) -> list[Tensor]:
        groups = sizes["groups"]
        by_group = tensor.reshape(groups, -1, *tensor.shape[1:])
        return [part.flatten(0, 1) for part in by_group.split([n // groups for n in rows], dim=1)]


class Turned:
    """[in, out] -> [out, in]."""

    def join(self, tensors: Sequence[Tensor], sizes: Sizes, out: Tensor | None = None) -> Tensor:
        turned = tensors[0].T
        return turned.contiguous() if out is None else out.copy_(turned)

    def split(self, tensor: Tensor, rows: Sequence[int], sizes: Sizes) -> list[Tensor]:
        return [tensor.T.contiguous()]


class Dealt:
    """Rows of gate and up in turn (bias [2f], or turned: [in, 2f]) -> the rows of gate, then those of up."""

    def join(self, tensors: Sequence[Tensor], sizes: Sizes, out: Tensor | None = None) -> Tensor:
        rows = tensors[0].T if tensors[0].ndim == 2 else tensors[0]
        return torch.cat([rows[0::2], rows[1::2]], out=out)

    def split(self, tensor: Tensor, rows: Sequence[int], sizes: Sizes) -> list[Tensor]:
        in_turn = torch.stack([*tensor.chunk(2)], dim=1).flatten(0, 1)
        return [in_turn.T.contiguous() if tensor.ndim == 2 else in_turn]


ONE, STACKED, GROUPED, TURNED, DEALT = One(), Stacked(), Grouped(), Turned(), Dealt()
