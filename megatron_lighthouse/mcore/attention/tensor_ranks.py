"""What Megatron 0.19 gets wrong of core attention over tensor-parallel ranks, made right.

Sinks: each rank's are of its own heads, which Megatron does not say of them (7452), so that the norm of the gradient counts
those of the first rank alone. MLA in local layers: all heads share the rotated channels of keys, and each rank has the gradient
of its own heads alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch.nn import Parameter

from megatron_lighthouse.mcore.attention.builder import Builder
from megatron_lighthouse.mcore.attention.local import LocalAttention


def with_counted_sinks(core_attention: Any) -> Any:
    """The same module, whose sinks, where it learns them, are counted on all ranks."""
    sinks = getattr(core_attention, "softmax_offset", None)
    if isinstance(sinks, Parameter) and not hasattr(sinks, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(sinks, True, 0, 1)
    return core_attention


def with_shared_channels(core_attention: Any) -> Any:
    """The same module of a local MLA layer, by which the rotated channels of keys get the gradient of all ranks' heads."""

    def shared(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, *rest = given
        own, rotated = key.split([key.shape[-1] - module.config.qk_pos_emb_head_dim, module.config.qk_pos_emb_head_dim], -1)
        return query, torch.cat([own, copy_to_tensor_model_parallel_region(rotated, group=module.tp_group)], -1), *rest

    core_attention.register_forward_pre_hook(shared)
    return core_attention


def over_tensor_ranks(core_attention: Any, config: TransformerConfig) -> Any:
    """The same module, made right where it is one of several ranks'."""
    latent = config.multi_latent_attention and isinstance(core_attention, LocalAttention)
    if latent and config.tensor_model_parallel_size > 1:
        core_attention = with_shared_channels(core_attention)
    return with_counted_sinks(core_attention)


@dataclass(frozen=True)
class OverTensorRanks(Builder):
    """Builds the core attention `base` of a layer spec, a class or a ModuleSpec, `over_tensor_ranks`."""

    base: Any

    def __call__(self, *, config: TransformerConfig, **kwargs: Any) -> Any:
        return over_tensor_ranks(build_module(self.base, config=config, **kwargs), config)
