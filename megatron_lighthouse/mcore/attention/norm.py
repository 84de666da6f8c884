"""A torch norm that works under sequence parallelism, which Megatron's local specs refuse without Apex."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


def torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
    """`torch.nn.LayerNorm` or `RMSNorm` whose parameters' gradients Megatron sums over the tensor-parallel ranks.

    Raises:
        ValueError: a variant of normalization that torch does not have.
    """
    classes = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
    if config.normalization not in classes or config.layernorm_zero_centered_gamma:
        raise ValueError(
            f"--normalization {config.normalization} (zero-centred: {config.layernorm_zero_centered_gamma}) with "
            "--sequence-parallel needs Apex or --transformer-impl transformer_engine: use LayerNorm or RMSNorm without "
            "--apply-layernorm-1p here."
        )
    norm = classes[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
