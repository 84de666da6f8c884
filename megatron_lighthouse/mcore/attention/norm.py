"""A torch norm that works under sequence parallelism, which Megatron's local specs refuse without Apex."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import L2Norm, WrappedTorchNorm

from megatron_lighthouse.mcore.command_line.own_parts import NORMS, norm_problem

OF_LAYER, OF_ATTENTION = ("input_layernorm", "pre_mlp_layernorm"), ("q_layernorm", "k_layernorm", "kv_layernorm")
"""The norms of a layer spec."""
OF_FURTHER = ("enorm", "hnorm", "layer_norm")
"""Those of a layer that predicts a further token, around the layer in it."""


def take_torch_norms(layer: Any) -> None:
    """Put `torch_norm` where a layer's submodules, or its attention's, name Megatron's own norm of torch."""
    attention = getattr(getattr(layer, "self_attention", None), "submodules", None)
    for holder, names in ((layer, OF_LAYER + OF_FURTHER), (attention, OF_ATTENTION)):
        for name in names:
            if getattr(holder, name, None) is WrappedTorchNorm:
                setattr(holder, name, torch_norm)


def take_l2_norms(attention: Any) -> None:
    """Put `--qk-l2-norm` into an attention's submodules, from which Megatron's local spec of one layer leaves it out."""
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name, None) is IdentityOp:
            setattr(attention, name, L2Norm)


def torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
    """`torch.nn.LayerNorm` or `RMSNorm` whose parameters' gradients Megatron sums over the tensor-parallel ranks.

    Raises:
        ValueError: a variant of normalization that torch does not have.
    """
    classes = dict(zip(NORMS, (torch.nn.LayerNorm, torch.nn.RMSNorm), strict=True))
    if problem := norm_problem(config):
        raise ValueError(problem)
    norm = classes[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
