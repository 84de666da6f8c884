"""Lighthouse as Megatron core attention: a layer on top of whatever core attention the spec would have used.

The wrapped attention is the *base class*, not a submodule: so parameters, `_extra_state`, checkpoint names and the
methods Megatron calls on it stay those of the dense layer, and checkpoints pass between the two unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.schemes import comm_type_problem
from megatron_lighthouse.lighthouse import telemetry
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.implementations import steps_for
from megatron_lighthouse.lighthouse.layer import Layer, build, made_from
from megatron_lighthouse.lighthouse.layer import check as check_inputs
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.mcore.attention.output import remember_source
from megatron_lighthouse.mcore.attention.over_shards import context_parallel_group, over_shards
from megatron_lighthouse.mcore.attention.te_choice import te_choice
from megatron_lighthouse.mcore.command_line.checks import check
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, heads_of_rank
from megatron_lighthouse.mcore.loop import switch
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.softmax.backends import capability_of, choose, choose_for_blocks
from megatron_lighthouse.softmax.blocks import BLOCKS


class LighthouseMixin:
    """Selects, lets the base class attend to the gathered rows, and scatters back. Holds no parameters."""

    lighthouse: LighthouseConfig
    layer_number: int
    inner_scale: float | None
    """Softmax scale of the inner attention; 1/sqrt(hn) if None."""
    dense_is_inner: bool
    """Whether the base class attends to the gathered rows, as Transformer Engine's does, or a backend of `inner`."""
    exchange: Exchange | None
    """The context-parallel ranks that share the sequence."""
    inner_comm_type: str
    """How a backend of `inner` attends over their shards."""
    rotary: Rotary | None
    """By which pooled rows are turned on to their window's last token."""
    layers: dict[Any, Layer]
    """By the shapes of their inputs."""
    settings: LighthouseSettings
    """Of the whole model: whether, and when, this layer becomes dense."""
    config: TransformerConfig

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
        """Megatron's core-attention contract.

        In stage 2 it is the base class's, called as Megatron calls a dense layer.

        Args:
            query: [s/cp, b, np/tp, hn]; key, value: [s/cp, b, ng/tp, hn], after RoPE, any strides.
            attention_mask: not read in stage 1: the attention is causal.

        Returns:
            [s/cp, b, np/tp * hn].

        Raises:
            ValueError: a call that is not causal self-attention over whole sequences.
        """
        dense = super().forward  # type: ignore[misc]
        if self._is_dense_now():
            given = {"attn_mask_type": attn_mask_type, "attention_bias": attention_bias, "packed_seq_params": packed_seq_params}
            return dense(query, key, value, attention_mask, **given, **kwargs)
        self._check_call(query, key, attn_mask_type, attention_bias, packed_seq_params)

        def base(rows_q: Tensor, rows_k: Tensor, rows_v: Tensor) -> Tensor:
            out = dense(rows_q, rows_k, rows_v, None, attn_mask_type=attn_mask_type, **kwargs)
            return out.unflatten(-1, rows_q.shape[2:])

        layer = self._layer_for(query, key, value)
        with telemetry.layer(self.layer_number):
            attended = layer.attended(query, key, value, base if self.dense_is_inner else None)
            output = attended.scatter().flatten(2)
        return remember_source(output, attended) if self.settings.discard_output else output

    def _layer_for(self, query: Tensor, key: Tensor, value: Tensor) -> Layer:
        """Built once for each shape of the inputs, which a run has one or two of."""
        made = made_from(query, key, value)
        layer = self.layers.get(made)
        if layer is None:
            check_inputs(query, key, value)
            how = (self.exchange, self.inner_comm_type, self.inner_scale, self.dense_is_inner, self.rotary)
            layer = self.layers[made] = build(self.lighthouse, query, key, *how)
        return layer

    def _is_dense_now(self) -> bool:
        given = self.settings
        return given.stage2 is not None and given.is_dense(self.layer_number, self.config.num_layers, switch.iteration())

    def _check_call(self, query: Tensor, key: Tensor, mask_type: AttnMaskType | None, bias: Tensor | None, packed: Any) -> None:
        if packed is not None:
            raise ValueError("packed sequences (thd) are not supported by --attention lighthouse: use --attention dense.")
        if bias is not None:
            raise ValueError("attention_bias is not supported by --attention lighthouse: use --attention dense.")
        if mask_type not in (None, AttnMaskType.causal) or query.shape[0] != key.shape[0]:
            raise ValueError(
                f"--attention lighthouse is causal self-attention over whole sequences, got mask type {mask_type}, "
                f"{query.shape[0]} queries and {key.shape[0]} keys: run inference with --attention dense."
            )


@cache
def lighthouse_class(base: type) -> type:
    """The Lighthouse layer over the core-attention class `base`."""
    return type("Lighthouse" + base.__name__, (LighthouseMixin, base), {"__module__": __name__})


@dataclass(frozen=True)
class CoreAttentionBuilder:
    """Builds the core attention of one layer, Lighthouse or dense by its global number."""

    base: Any
    """What the spec had: a core-attention class, or a ModuleSpec of one."""
    settings: LighthouseSettings
    rotary: Rotary | None = None
    """The rotation of the model's layers, where pooled rows are to stand at their window's last token."""

    def __call__(self, *, config: TransformerConfig, layer_number: int, **kwargs: Any) -> Any:
        params: dict[str, Any] = {}
        module = self.base
        if isinstance(module, ModuleSpec):
            module, params = module.module, dict(module.params)
            if self.base.submodules is not None:
                params["submodules"] = self.base.submodules
        module = over_shards(module, config)
        if self.settings.is_dense(layer_number, config.num_layers):
            return module(config=config, layer_number=layer_number, **params, **kwargs)
        if not isinstance(module, type):
            raise ValueError(
                f"--attention lighthouse cannot wrap the core attention {module!r}: it wraps classes such as "
                "DotProductAttention and TEDotProductAttention."
            )
        check(config, self.settings, None)
        here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        rows = torch.empty(0, config.kv_channels, dtype=config.params_dtype, device=here)
        SCORERS[self.settings.config.scorer].check_installed(steps_for(self.settings.config.steps, rows), here)
        layer = lighthouse_class(module)(config=config, layer_number=layer_number, **params, **kwargs)
        layer.lighthouse = self.settings.config_of(layer_number, config.num_layers)
        layer.rotary = None if config.no_rope_freq and config.no_rope_freq[layer_number - 1] else self.rotary
        layer.settings = self.settings
        layer.layers = {}
        layer.inner_scale = kwargs.get("softmax_scale")
        layer.exchange = Exchange.over(context_parallel_group(kwargs.get("pg_collection")))
        layer.inner_comm_type = kwargs.get("cp_comm_type") or "p2p"
        layer.dense_is_inner = dense_is_inner(self.settings, module)
        if not layer.dense_is_inner:
            self._check_inner(layer, config, here)
        elif "transformer_engine" in module.__module__:
            say_once(te_choice(capability_of(here)))
        return layer

    def _check_inner(self, layer: Any, config: TransformerConfig, device: torch.device) -> None:
        """Name a backend that is missing, or a scheme that cannot be, before training starts."""
        heads, groups = heads_of_rank(config)
        name, rows = self.settings.config.inner, (device, config.params_dtype, heads, groups, config.kv_channels)
        if layer.exchange is None or layer.inner_comm_type == "a2a":
            choose(name, *rows)
        else:
            choose_for_blocks(name, list(BLOCKS), *rows)
        if layer.exchange and (problem := comm_type_problem(layer.inner_comm_type, heads, groups, layer.exchange.size)):
            raise ValueError(problem)


def dense_is_inner(settings: LighthouseSettings, module: type) -> bool:
    """Whether the core attention `module` of the spec attends to the gathered rows itself.

    Transformer Engine's does, unless another is forced. Megatron's local one would keep all scores, so it does not.
    """
    name, of_te = settings.config.inner, "transformer_engine" in module.__module__
    return (of_te and name == "te") or (name == "auto" and not issubclass(module, DotProductAttention))
