"""The streams of a variant: projections of a layer's input that its core attention reads besides q, k and v.

They are appended as further heads, [q, stream, …], or [v, stream, …] where RoPE must not rotate them, so that recompute and
offloading see three tensors as ever; the core attention splits these. Each is a module of its own, since an optimizer may take
the rows of `linear_qkv` for heads of q, k and v.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as engine
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor
from torch.nn.functional import pad

from megatron_lighthouse.mcore.command_line.checks import unnormed
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.variant import Stream, norm_of


class StreamsMixin:
    """A self-attention with a variant's streams."""

    config: TransformerConfig
    pg_collection: Any
    streams: tuple[Stream, ...]
    hidden_size_per_attention_head: int
    gathers: bool
    """Whether the input of all projections is gathered once, from what sequence parallelism shares out."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int,
        *args: Any,
        settings: LighthouseSettings,
        **named: Any,
    ) -> None:
        streams = settings.streams if layer_number in settings.in_model(config).holding(config.num_layers) else ()
        # Transformer Engine's projections sum the gradient of their input themselves: there each gathers for itself
        self.gathers = bool(streams) and config.sequence_parallel and submodules.linear_qkv is ColumnParallelLinear
        if self.gathers:
            submodules = replace(submodules, linear_qkv=_of_gathered(submodules.linear_qkv))
        super().__init__(config, submodules, layer_number, *args, **named)  # type: ignore[call-arg]
        self.streams = streams
        for stream in streams:
            setattr(self, f"linear_{stream.name}", self._projection(stream))
            if stream.like_queries and config.qk_layernorm and not config.qk_l2_norm:
                how = {"hidden_size": self.hidden_size_per_attention_head, "eps": config.layernorm_epsilon}
                setattr(self, norm_of(stream), submodules.q_layernorm(config=config, **how))

    def _projection(self, stream: Stream) -> ColumnParallelLinear:
        """hidden -> the columns of a stream, in plain order of heads."""
        make = _of_gathered(ColumnParallelLinear) if self.gathers else ColumnParallelLinear
        heads = self.config.num_attention_heads
        biased = stream.like_queries and (self.config.add_bias_linear or self.config.add_qkv_bias)
        linear = make(
            self.config.hidden_size,
            stream.columns(heads, self.config.num_query_groups or heads, self.config.kv_channels),
            config=self.config,
            init_method=stream.init or self.config.init_method,
            bias=stream.bias is not None or biased,
            tp_group=self.pg_collection.tp,
        )
        if stream.bias is not None and self.config.perform_initialization:
            with torch.no_grad():
                linear.bias.fill_(stream.bias)
        return linear

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **named: Any) -> tuple[Any, ...]:
        """As `SelfAttention`'s, streams behind heads of queries and values; with sequence parallelism s is gathered once."""
        if self.gathers:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
        query, key, value, *rest = super().get_query_key_value_tensors(hidden_states, *args, **named)  # type: ignore[misc]
        return self._with_streams(query, True, hidden_states), key, self._with_streams(value, False, hidden_states), *rest

    def _with_streams(self, x: Tensor, rotated: bool, hidden_states: Tensor) -> Tensor:
        """[s, b, ·, hn], behind it those of the streams that RoPE rotates, or does not."""
        heads = [self._heads(stream, hidden_states) for stream in self.streams if stream.rotated == rotated]
        return torch.cat([x, *heads], dim=2) if heads else x

    def _heads(self, stream: Stream, hidden_states: Tensor) -> Tensor:
        """[s, b, ·, hn]; of streams with fewer columns a head, as many rows of hn as they fill."""
        projected, _ = getattr(self, f"linear_{stream.name}")(hidden_states)
        dim = self.hidden_size_per_attention_head
        heads = pad(projected, (0, -projected.shape[-1] % dim)).unflatten(-1, (-1, dim))
        norm = getattr(self, norm_of(stream), None)
        return heads if norm is None else norm(heads)


def apart(
    query: Tensor, key: Tensor, value: Tensor, heads: int, streams: Sequence[Stream]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What `get_query_key_value_tensors` put together: queries, values, and streams, of fewer columns a head [..., these].

    Args:
        query, value: [s, b, ·, hn], with those of the streams.
        key: [s, b, ng/tp, hn].
        heads: query heads of this rank.
    """
    groups = key.shape[2]
    query, turned = _split(query, heads, [stream for stream in streams if stream.rotated], heads, groups)
    value, others = _split(value, groups, [stream for stream in streams if not stream.rotated], heads, groups)
    found = {**turned, **others}
    return query, value, [found[stream.name] for stream in streams]


def _split(x: Tensor, own: int, streams: list[Stream], heads: int, groups: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The first `own` heads, and the streams behind them by name."""
    if not streams:
        return x, {}
    columns = [stream.columns(heads, groups, x.shape[-1]) for stream in streams]
    x, *rows = x.split([own, *(-(-count // x.shape[-1]) for count in columns)], dim=2)
    found = zip(streams, columns, rows, strict=True)
    return x, {s.name: row.flatten(2)[..., :count].unflatten(-1, (s.heads(heads, groups), -1)) for s, count, row in found}


def _norms_apart(layer: Any, attention: Any) -> bool:
    """Have Transformer Engine's norm, which is within its linear_qkv, be one of its own; False where it is not there.

    In a checkpoint its weights keep their names.
    """
    if attention.linear_qkv is not engine.TELayerNormColumnParallelLinear:
        return False
    layer.input_layernorm, attention.linear_qkv = engine.TENorm, engine.TEColumnParallelLinear
    apart = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    layer.sharded_state_dict_keys_map = {**layer.sharded_state_dict_keys_map, **apart}
    return True


def _of_gathered(linear: Callable[..., Any]) -> Callable[..., Any]:
    """The builder `linear` for an input that is gathered already, whose gradient the gathering sums over the ranks."""

    def build(*args: Any, config: TransformerConfig, **named: Any) -> Any:
        alone = copy.copy(config)
        alone.sequence_parallel = False
        return linear(*args, config=alone, disable_grad_reduce=True, **named)

    return build


@cache
def class_with_streams(base: type[Any]) -> type[Any]:
    """The self-attention class `base` with streams."""
    return type("Streams" + base.__name__, (StreamsMixin, base), {"__module__": __name__})


def add_streams(layer: Any, settings: LighthouseSettings) -> None:
    """Have the submodules of a layer spec build the variant's streams; nothing where it has none, or they are there.

    Raises:
        ValueError: a layer whose input reaches the self-attention before it is normed, or that has another self-attention.
    """
    attention: Any = getattr(layer, "self_attention", None)
    if not settings.streams or not hasattr(getattr(attention, "submodules", None), "core_attention"):
        return
    if not (isinstance(attention.module, type) and issubclass(attention.module, SelfAttention)):
        raise ValueError(f"--attention {settings.variant} adds projections to SelfAttention, not to {attention.module!r}.")
    if layer.input_layernorm is IdentityOp and not _norms_apart(layer, attention.submodules):
        raise ValueError(unnormed(settings))
    module: Any = attention.module
    if not issubclass(module, StreamsMixin):
        params = {**attention.params, "settings": settings}
        layer.self_attention = ModuleSpec(class_with_streams(module), params, attention.submodules)
