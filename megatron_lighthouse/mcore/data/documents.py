"""The documents of a micro-batch, from what Megatron's datasets say of each row; and this rank's part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.sequence.documents import Documents, check_cu_seqlens
from megatron_lighthouse.sequence.layout import Layout


def documents_in(cu_seqlens: Tensor) -> Documents:
    """Those of all rows, one row after the other.

    Args:
        cu_seqlens: [b, any], int32: of each row, filled up with its length.
    """
    here = cu_seqlens.cpu()  # which waits for the device, once a micro-batch
    ends = here[:, 1:]
    offsets = here[:, -1:] * torch.arange(len(here), dtype=torch.int32).unsqueeze(1)
    bounds = torch.cat([here.new_zeros(1), (ends + offsets)[ends > here[:, :-1]]])
    lengths = check_cu_seqlens(bounds, int(here[0, -1]) * len(here))
    return Documents(bounds.to(cu_seqlens.device), lengths)


def documents_until(tokens: Tensor, end: int) -> Documents:
    """Those of one row of tokens, [t], each of which ends with the token `end`, but the last where the row cuts it."""
    ends = (tokens[:-1] == end).nonzero().squeeze(1) + 1
    bounds = torch.cat([ends.new_zeros(1), ends, ends.new_tensor([len(tokens)])]).int()
    return Documents.of(bounds, len(tokens))


def tokens_of_rank(documents: Documents, rows: int, layout: Layout) -> Tensor:
    """[b, s/cp], int64: the tokens that a rank holds of b rows, numbered through all of them."""
    chunks = 2 if layout.size > 1 else 1
    return documents.rows_of_rank(layout).unflatten(0, (chunks, rows, -1)).transpose(0, 1).flatten(1)
