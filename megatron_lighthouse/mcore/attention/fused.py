"""Megatron's local dense attention without its scores, for forward passes at long context, and for packed documents.

`DotProductAttention` keeps heads x N x N of them, 17 GB a head at 64K tokens in fp32. This gives the same sums from a backend
that keeps none. Causal, no dropout: so for evaluation, and in training for documents alone, which Megatron's does not take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_lighthouse.mcore.attention.local import LocalAttention
from megatron_lighthouse.mcore.attention.over_shards import in_place_of_local
from megatron_lighthouse.mcore.attention.packed import ThdMixin, attend_documents, check_call, class_over_thd
from megatron_lighthouse.mcore.command_line.documents import FLAG
from megatron_lighthouse.mcore.command_line.layers import is_windowed
from megatron_lighthouse.softmax.backends import Attend, inner_attention
from megatron_lighthouse.softmax.documents import documents_attention
from megatron_lighthouse.softmax.inputs import made_from


class FusedAttention(LocalAttention):
    """Causal attention of one rank's heads over whole sequences, or within each document of packed rows."""

    def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, softmax_scale=softmax_scale, **kwargs)
        self.given_scale = softmax_scale
        self.attend: dict[Any, Attend] = {}
        self.within: dict[Any, Callable[..., Tensor]] = {}
        self.window = self.config.window_size[0] if is_windowed(self.config, self.layer_number) else None

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
            ValueError: a call that is not causal self-attention; whole sequences, of a layer with a window or with sinks.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        check_call("attention without kept scores", mask_type, attention_bias, packed_seq_params, 1)
        made = made_from(query, key, value)
        if packed_seq_params is not None:
            within = self.within.get(made)
            if within is None:
                q, k = (x if x.dim() == 4 else x.unsqueeze(1) for x in (query, key))
                within = self.within[made] = documents_attention(
                    "auto",
                    q,
                    k,
                    self.given_scale,
                    value_dim=value.shape[-1],
                    window=self.window,
                    sinks=self.softmax_offset is not None,
                )
            return attend_documents(within, query, key, value, packed_seq_params, 1, self.softmax_offset)
        if attention_mask is not None:
            raise ValueError("attention without kept scores is causal, and reads no mask.")
        if self.window is not None or self.softmax_offset is not None:
            raise ValueError(
                "attention without kept scores has windows and sinks over packed documents alone: give packed_seq_params, or "
                "use Megatron's DotProductAttention."
            )
        attend = self.attend.get(made)
        if attend is None:
            attend = self.attend[made] = inner_attention("auto", query, key, self.given_scale, value.shape[-1])
        return attend(query, key, value).flatten(2)


def of_documents(core_attention: Any) -> Any:
    """`core_attention` of a layer spec, Megatron's local one or Transformer Engine's, made one that takes packed documents.

    Raises:
        ValueError: another core attention.
    """
    module = core_attention.module if isinstance(core_attention, ModuleSpec) else core_attention
    if isinstance(module, type) and issubclass(module, (FusedAttention, ThdMixin)):  # layers of a block may share a spec
        return core_attention
    if module is DotProductAttention:
        return in_place_of_local(core_attention, FusedAttention)
    if not isinstance(module, type) or "transformer_engine" not in module.__module__:
        raise ValueError(f"{FLAG} takes the core attention of Megatron's own layer specs, not {module!r}.")
    over = class_over_thd(module)
    return replace(core_attention, module=over) if isinstance(core_attention, ModuleSpec) else over
