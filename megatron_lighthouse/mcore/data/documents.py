"""The documents of a micro-batch, from what Megatron's datasets say of each row; and this rank's part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.sequence.layout import Layout


def documents_in(cu_seqlens: Tensor) -> Documents:
    """Those of all rows, one row after the other.

    Args:
        cu_seqlens: [b, any], int32: of each row, filled up with its length.
    """
    ends = cu_seqlens[:, 1:]
    offsets = cu_seqlens[:, -1:] * torch.arange(len(cu_seqlens), device=cu_seqlens.device, dtype=torch.int32).unsqueeze(1)
    kept = (ends + offsets)[ends > cu_seqlens[:, :-1]]
    return Documents.of(torch.cat([kept.new_zeros(1), kept]), int(cu_seqlens[0, -1]) * len(cu_seqlens))


def tokens_of_rank(documents: Documents, rows: int, layout: Layout) -> Tensor:
    """[b, s/cp], int64: the tokens that a rank holds of b rows, numbered through all of them."""
    chunks = 2 if layout.size > 1 else 1
    return documents.rows_of_rank(layout).unflatten(0, (chunks, rows, -1)).transpose(0, 1).flatten(1)
