"""Memory that one tensor after the other is put together in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Reused:
    """Gives the same memory again: the kernel takes several times as long to make pages as it takes to fill them."""

    def __init__(self) -> None:
        self._storage = torch.UntypedStorage(0)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of its own storage, whose memory the next one takes."""
        size = torch.Size(shape)
        count = size.numel() * dtype.itemsize
        if self._storage.nbytes() < count:
            self._storage = torch.UntypedStorage(0)  # so that the old is free before the new is taken
            self._storage = torch.UntypedStorage(count)
        return torch.empty(0, dtype=dtype).set_(self._storage[:count]).view(size)
