"""The norm scorer: a token counts as much as its query and its key are long."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_scores(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """s^Q_j = ‖Q_j‖₂ and s^K_j = ‖K_j‖₂ (paper, "norm" scorer).

    Args:
        query: [N, B, H, D], any floating dtype, any strides.
        key: [N, B, G, D], G dividing H.

    Returns:
        Two [B, G, N] tensors, fp32 (fp64 for fp64 inputs). With grouped queries s^Q_j is the norm of the
        group's H/G query rows taken as one vector (ours; H = G is the paper).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(2, (key.shape[2], -1))
    score_q = torch.linalg.vector_norm(grouped, dim=(-2, -1), dtype=dtype)
    score_k = torch.linalg.vector_norm(key, dim=-1, dtype=dtype)
    return score_q.permute(1, 2, 0), score_k.permute(1, 2, 0)
