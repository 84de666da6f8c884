"""Layer specs whose dense layers keep no scores: what an evaluation at long context takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.transformer import ModuleSpec

from megatron_lighthouse.mcore.attention.copied import copied
from megatron_lighthouse.mcore.attention.core_attention import CoreAttentionBuilder
from megatron_lighthouse.mcore.attention.fused import FusedAttention
from megatron_lighthouse.mcore.attention.layer_specs import attentions_of
from megatron_lighthouse.mcore.attention.over_shards import in_place_of_local
from megatron_lighthouse.mcore.command_line.layers import hybrid_pattern


def with_fused_attention(model_cfg: Any) -> Any:
    """`model_cfg` (of a GPT or a hybrid model) whose layers, where Megatron's local core attention is theirs, have this one.

    Left alone: other core attentions, and where the softmax has a window or a sink, which this does not know.
    """
    config = model_cfg.transformer
    if config.transformer_impl != "local" or config.window_size is not None or config.softmax_type != "vanilla":
        return model_cfg
    if hybrid_pattern(config):
        model_cfg.hybrid_stack_spec = _with_fused(model_cfg.hybrid_stack_spec)
        return model_cfg
    given = model_cfg.transformer_layer_spec

    def layer_spec(model_cfg: Any, vp_stage: int | None = None) -> Any:
        from megatron.training.models.gpt import default_layer_spec

        make: Callable[..., Any] = default_layer_spec if given is None else given
        stage = {"vp_stage": vp_stage} if "vp_stage" in inspect.signature(make).parameters else {}
        return _with_fused(make(model_cfg, **stage))

    if given is None or (callable(given) and not isinstance(given, ModuleSpec)):
        model_cfg.transformer_layer_spec = layer_spec
    return model_cfg


def _with_fused(spec: Any) -> Any:
    spec = copied(spec)
    for submodules in attentions_of(spec):
        submodules.core_attention = _fused(submodules.core_attention)
    return spec


def _fused(core_attention: Any) -> Any:
    if isinstance(core_attention, CoreAttentionBuilder):
        return replace(core_attention, base=_fused(core_attention.base))
    return in_place_of_local(core_attention, FusedAttention)
