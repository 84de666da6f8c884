"""Merge: an average over two sets of keys, from the averages over each."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.gpu import triton_takes


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Turn (out, lse) into those over the keys of both, in place; sums in the dtype of `lse`.

    out = out * e^(lse - z) + part_out * e^(part_lse - z) with z = log(e^lse + e^part_lse) (FlashAttention's rule).

    Args:
        out: [n, B, H, D], in the result's dtype, or in that of sums where more is to be merged.
        lse, part_lse: [B, H, n].
        part_out: [n, B, H, D].
    """
    if triton_takes(out):
        from megatron_lighthouse.kernels.merge import merge as kernel

        return kernel(out, lse, part_out, part_lse)
    total = torch.logaddexp(lse, part_lse)
    first, second = ((x - total).exp().permute(2, 0, 1).unsqueeze(-1) for x in (lse, part_lse))
    out.copy_(out.to(lse.dtype) * first + part_out.to(lse.dtype) * second)
    lse.copy_(total)
    return None
