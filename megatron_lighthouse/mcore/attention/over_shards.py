"""Megatron's local core attention for sequences that are sharded over context-parallel ranks.

Megatron refuses context parallelism without Transformer Engine: its own `DotProductAttention` asserts that there is none. This
takes its place, in dense layers and under Lighthouse ones, with the same parameters (none) and the same contract.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.schemes import comm_type_problem
from megatron_lighthouse.mcore.attention.local import LocalAttention
from megatron_lighthouse.mcore.attention.packed import attend_documents, check_call
from megatron_lighthouse.mcore.command_line.layers import is_windowed
from megatron_lighthouse.mcore.command_line.own_parts import over_shards_problems
from megatron_lighthouse.options import in_flags
from megatron_lighthouse.softmax.inputs import made_from
from megatron_lighthouse.softmax.sharded import ShardedAttention, sharded_attention
from megatron_lighthouse.softmax.sharded_documents import sharded_documents_attention


class ContextParallelAttention(LocalAttention):
    """Causal attention over the tokens of all context-parallel ranks, in Megatron's zigzag order or in that of documents."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **channels: int,
    ) -> None:
        """See `LocalAttention`.

        Raises:
            ValueError: dropout, a window that is not causal, or a `cp_comm_type` that cannot be.
        """
        if found := [*over_shards_problems(config, attention_dropout)]:
            raise ValueError("\n".join(found))
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        how = (attn_mask_type, attention_type, attention_dropout, softmax_scale, cp_comm_type, pg_collection)
        super().__init__(alone, layer_number, *how, **channels)
        self.config = config
        self.given_scale = softmax_scale
        self.window = config.window_size[0] if is_windowed(config, layer_number) else None
        self.cp_comm_type = cp_comm_type or "p2p"
        self.exchange = Exchange.over(context_parallel_group(pg_collection))
        self.attend: dict[Any, ShardedAttention] = {}
        self.within: dict[Any, Callable[..., Tensor]] = {}
        heads, groups = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        if problem := comm_type_problem(self.cp_comm_type, heads, groups, config.context_parallel_size):
            raise ValueError(in_flags(problem))

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
        """[s/cp, b, np/tp, hn] and twice [s/cp, b, ng/tp, hn] -> [s/cp, b, np/tp * hn], hn of the values.

        Raises:
            ValueError: a call that is not causal self-attention.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        assert self.exchange is not None
        size = self.exchange.size
        check_call("--context-parallel-size without Transformer Engine", mask_type, attention_bias, packed_seq_params, size)
        made = made_from(query, key, value)
        if packed_seq_params is not None:
            within = self.within.get(made)
            if within is None:
                within = self.within[made] = self._over_ranks(sharded_documents_attention, query, key, value)
            return attend_documents(within, query, key, value, packed_seq_params, size, self.softmax_offset)
        attend = self.attend.get(made)
        if attend is None:
            attend = self.attend[made] = self._over_ranks(sharded_attention, query, key, value)
        return attend(query, key, value, self.softmax_offset).flatten(2)

    def _over_ranks[T](self, build: Callable[..., T], query: Tensor, key: Tensor, value: Tensor) -> T:
        """What attends to rows like these, by `sharded_attention` or `sharded_documents_attention`."""
        return build(
            "auto",
            query,
            key,
            self.exchange,
            self.cp_comm_type,
            self.given_scale,
            window=self.window,
            sinks=self.softmax_offset is not None,
            value_dim=value.shape[-1],
        )


def able_local(core_attention: Any, config: TransformerConfig) -> Any:
    """`core_attention` of a layer spec; where it is Megatron's local one, what takes context-parallel ranks, or MLA."""
    if config.context_parallel_size > 1:
        return in_place_of_local(core_attention, ContextParallelAttention)
    return in_place_of_local(core_attention, LocalAttention) if config.multi_latent_attention else core_attention


def in_place_of_local(core_attention: Any, other: type) -> Any:
    """`core_attention` of a layer spec, a class or a ModuleSpec; where it is Megatron's local one, `other`."""
    local = (DotProductAttention, LocalAttention)
    if isinstance(core_attention, ModuleSpec) and core_attention.module in local:
        return ModuleSpec(other, params=core_attention.params, submodules=core_attention.submodules)
    return other if core_attention in local else core_attention


def context_parallel_group(pg_collection: ProcessGroupCollection | None) -> Any:
    """The context-parallel ranks of this rank's sequence; None where nothing says that there are several."""
    group = getattr(pg_collection, "cp", None)
    return group if group is not None else parallel_state.get_context_parallel_group(check_initialized=False)


def tensor_parallel_rank(pg_collection: ProcessGroupCollection | None) -> int:
    """Of this rank among those that share the heads; 0 where nothing says that there are several."""
    group = getattr(pg_collection, "tp", None) or parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    return 0 if group is None else int(group.rank())
