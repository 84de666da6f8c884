"""Megatron's local dense attention without its scores, for forward passes at long context.

`DotProductAttention` keeps heads x N x N of them, 17 GB a head at 64K tokens in fp32. This gives the same sums from a backend
that keeps none. Causal, whole sequences, no dropout: so for evaluation, not in place of Megatron's in training.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_lighthouse.mcore.attention.core_attention import CoreAttentionBuilder
from megatron_lighthouse.mcore.attention.layer_specs import attentions_of
from megatron_lighthouse.mcore.attention.over_shards import in_place_of_local
from megatron_lighthouse.softmax.backends import Attend, deterministic, inner_attention


class FusedAttention(DotProductAttention):  # type: ignore[misc]
    """Causal attention of one rank's heads over whole sequences."""

    def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, softmax_scale=softmax_scale, **kwargs)
        self.given_scale = softmax_scale
        self.attend: dict[Any, Attend] = {}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[s, b, np/tp, hn] and twice [s, b, ng/tp, hn] -> [s, b, np/tp * hn].

        Raises:
            ValueError: a call that is not causal self-attention over whole sequences.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if mask_type != AttnMaskType.causal or not (attention_mask is attention_bias is packed_seq_params is None):
            raise ValueError(f"an evaluation attends causally to whole sequences, without masks or a bias, not by {mask_type}.")
        made_from = (query.shape, key.shape, query.dtype, query.device, deterministic())
        attend = self.attend.get(made_from)
        if attend is None:
            attend = self.attend[made_from] = inner_attention("auto", query, key, self.given_scale)
        return attend(query, key, value).flatten(2)


def with_fused_attention(model_cfg: Any) -> Any:
    """`model_cfg` (a GPTModelConfig) whose layers, where Megatron's local core attention is theirs, have this one.

    Left alone: other core attentions, and where the softmax has a window or a sink, which this does not know.
    """
    config, given = model_cfg.transformer, model_cfg.transformer_layer_spec
    if config.transformer_impl != "local" or config.window_size is not None or config.softmax_type != "vanilla":
        return model_cfg

    def layer_spec(model_cfg: Any, vp_stage: int | None = None) -> Any:
        from megatron.training.models.gpt import default_layer_spec

        make: Callable[..., Any] = default_layer_spec if given is None else given
        stage = {"vp_stage": vp_stage} if "vp_stage" in inspect.signature(make).parameters else {}
        spec = copy.deepcopy(make(model_cfg, **stage))
        for submodules in attentions_of(spec):
            submodules.core_attention = _fused(submodules.core_attention)
        return spec

    if given is None or (callable(given) and not isinstance(given, ModuleSpec)):
        model_cfg.transformer_layer_spec = layer_spec
    return model_cfg


def _fused(core_attention: Any) -> Any:
    if isinstance(core_attention, CoreAttentionBuilder):
        return replace(core_attention, base=_fused(core_attention.base))
    return in_place_of_local(core_attention, FusedAttention)
