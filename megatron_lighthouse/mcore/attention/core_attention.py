"""A variant as Megatron core attention: a layer on top of whatever core attention the spec would have used.

The wrapped attention is the *base class*, not a submodule: so parameters, `_extra_state`, checkpoint names and the
methods Megatron calls on it stay those of the dense layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from megatron_lighthouse.gpu import capability_of
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.mcore.attention import te_flash
from megatron_lighthouse.mcore.attention.builder import Builder
from megatron_lighthouse.mcore.attention.output import remember_source
from megatron_lighthouse.mcore.attention.over_shards import able_local, context_parallel_group, tensor_parallel_rank
from megatron_lighthouse.mcore.attention.packed import cut_problem, documents_of, in_one_row, in_rows, packed
from megatron_lighthouse.mcore.attention.scales import with_scales
from megatron_lighthouse.mcore.attention.streams import apart
from megatron_lighthouse.mcore.attention.te_choice import te_choice
from megatron_lighthouse.mcore.attention.tensor_ranks import over_tensor_ranks
from megatron_lighthouse.mcore.command_line import fp8
from megatron_lighthouse.mcore.command_line.checks import check
from megatron_lighthouse.mcore.command_line.layers import is_windowed
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, head_dims, heads_of_rank
from megatron_lighthouse.mcore.loop import switch
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.options import in_flags
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.softmax.inputs import check as check_inputs
from megatron_lighthouse.softmax.inputs import made_from
from megatron_lighthouse.softmax.rows import RowKind
from megatron_lighthouse.variant import DocumentLayer, Layer, Place, Stream, Variant


class VariantMixin:
    """Has a variant's layer attend, in which the base class may attend to rows. Holds no parameters."""

    layer_number: int
    place: Place
    """Where it stands; with what of Megatron's."""
    variant: Variant
    """What it is at first."""
    variant_config: Any
    """The config of that."""
    layers: dict[Any, Any]
    """By the variant, and the shapes of their inputs."""
    settings: LighthouseSettings
    """Of the whole model: what this layer is, and when it becomes another."""
    streams: tuple[Stream, ...]
    """What comes with the queries."""
    config: TransformerConfig
    softmax_offset: Tensor | None
    """Of the base class: the sinks, [np/tp]."""

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

        Where the layer is dense it is the base class's, called as Megatron calls a dense layer.

        Args:
            query: [s/cp, b, np/tp, hn], and those of the streams, after RoPE, any strides.
            key: [s/cp, b, ng/tp, hn], likewise; value: likewise, and those of the streams that RoPE does not rotate.
            attention_mask: read where the layer is dense alone: else the attention is causal.

        Returns:
            [s/cp, b, np/tp * hn], hn of the values.

        Raises:
            ValueError: a call that is not causal self-attention over whole sequences.
        """
        dense = super().forward  # type: ignore[misc]
        now, now_config = self._now()
        if now.native:
            given = {"attn_mask_type": attn_mask_type, "attention_bias": attention_bias, "packed_seq_params": packed_seq_params}
            return dense(query, key, value, attention_mask, **given, **kwargs)
        self._check_call(query, key, attn_mask_type, attention_bias, packed_seq_params)

        def base(rows_q: Tensor, rows_k: Tensor, rows_v: Tensor, documents: Documents | None = None) -> Tensor:
            within = None if documents is None else packed(documents, documents.longest)
            given = {"attn_mask_type": attn_mask_type, "packed_seq_params": within}
            out = dense(rows_q, rows_k, rows_v, None, **given, **kwargs)
            return out.unflatten(-1, (rows_q.shape[2], -1))

        attend = base if self.place.base_attends else None
        if packed_seq_params is not None:
            return self._within_documents(query, key, value, packed_seq_params, attend)
        query, value, streams = self._apart(query, key, value)
        layer: Layer = self._built(now.build, now_config, query, key, value)
        out, again = layer(query, key, value, *streams, attend=attend, **self._sinks())
        return out.flatten(2) if again is None else remember_source(out.flatten(2), again)

    def _within_documents(
        self, query: Tensor, key: Tensor, value: Tensor, params: Any, attend: Callable[..., Tensor] | None
    ) -> Tensor:
        """As `forward`, of rows that are packed documents."""
        if query.dim() == 3:  # Megatron's own 'thd', of which it makes [t, 1, np * hn] afterwards
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            return self._within_documents(query, key, value, params, attend).squeeze(1)
        rows, ranks = query.shape[1], self._ranks
        documents = documents_of(params, query.shape[0] * rows * ranks)
        query, key, value = (in_one_row(x, ranks) for x in (query, key, value))
        query, value, streams = self._apart(query, key, value)
        now, now_config = self._now()
        layer: DocumentLayer = self._built(now.build_documents, now_config, query, key, value)
        out, again = layer(query, key, value, *streams, documents=documents, attend=attend, **self._sinks())
        out = in_rows(out, rows, ranks).flatten(2)
        return out if again is None else remember_source(out, lambda: in_rows(again(), rows, ranks))

    def _apart(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The queries, the values, and the streams that travel with them."""
        return apart(query, key, value, heads_of_rank(self.config)[0], self.streams)

    def _sinks(self) -> dict[str, Tensor | None]:
        """The base class's, where the layer attends instead of it."""
        return {"sinks": self.softmax_offset} if self.place.sinks else {}

    def _built[T](
        self, build: Callable[[Any, Tensor, Tensor, Place], T], config: Any, query: Tensor, key: Tensor, value: Tensor
    ) -> T:
        """What `build` makes, once for each shape of the inputs, which a run has one or two of."""
        past_alone = self._past_alone
        made = (build.__qualname__, past_alone, *made_from(query, key, value))
        layer: T | None = self.layers.get(made)
        if layer is None:
            check_inputs(query, key, value)
            place = replace(self.place, past_alone=True) if past_alone else self.place
            layer = self.layers[made] = build(config, query, key, place)
        return layer

    @property
    def _past_alone(self) -> bool:
        """While layers select causally, none of the others may round by later tokens either."""
        given = self.settings
        causal = bool(getattr(given.config, "causal_selection", False))
        return causal and not (given.schedule and given.schedule.all_dense(switch.iteration()))

    @property
    def _ranks(self) -> int:
        return self.place.exchange.size if self.place.exchange else 1

    def _now(self) -> tuple[Variant, Any]:
        """What it is in this iteration, and the config of that."""
        given = self.settings
        if given.schedule is None or not given.is_dense(self.layer_number, self.config.num_layers, switch.iteration()):
            return self.variant, self.variant_config
        return given.base, given.base_config

    def _check_call(self, query: Tensor, key: Tensor, mask_type: AttnMaskType | None, bias: Tensor | None, params: Any) -> None:
        ours = f"--attention {self.settings.variant}"
        if params is not None:
            now, now_config = self._now()
            if problem := cut_problem(params, self._ranks) or next(now.document_problems(now_config, self._ranks), None):
                raise ValueError(problem)
        if bias is not None:
            raise ValueError(f"attention_bias is not supported by {ours}: use --attention dense.")
        causal = (None, AttnMaskType.causal) if params is None else (None, AttnMaskType.causal, AttnMaskType.padding_causal)
        if mask_type not in causal or query.shape[0] != key.shape[0]:
            raise ValueError(
                f"{ours} is causal self-attention over whole sequences, got mask type "
                f"{mask_type}, {query.shape[0]} queries and {key.shape[0]} keys: run inference with --attention dense."
            )


@cache
def class_over(base: type, title: str) -> type:
    """The layer of a variant over the core-attention class `base`."""
    return type(title + base.__name__, (VariantMixin, base), {"__module__": __name__})


@dataclass(frozen=True)
class CoreAttentionBuilder(Builder):
    """Builds the core attention of one layer, the variant's or dense by its global number."""

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
        module, settings = with_scales(able_local(module, config), config), self.settings.in_model(config)
        now, now_config = settings.at_first(layer_number, config.num_layers)
        if now.native or layer_number not in settings.holding(config.num_layers):
            return over_tensor_ranks(module(config=config, layer_number=layer_number, **params, **kwargs), config)
        if not isinstance(module, type):
            raise ValueError(
                f"--attention {self.settings.variant} cannot wrap the core attention {module!r}: it wraps classes such as "
                "DotProductAttention and TEDotProductAttention."
            )
        check(config, settings, None)
        here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        inputs = RowKind(here, config.params_dtype, *heads_of_rank(config), *head_dims(config))
        of_te = "transformer_engine" in module.__module__
        if of_te:
            te_flash.mend()
        groups = kwargs.get("pg_collection")
        base_attends = now.base_attends(now_config, of_te, issubclass(module, DotProductAttention))
        place = Place(
            number=layer_number,
            exchange=Exchange.over(context_parallel_group(groups)),
            comm_type=kwargs.get("cp_comm_type") or "p2p",
            scale=kwargs.get("softmax_scale"),
            first_head=inputs.heads * tensor_parallel_rank(groups),
            base_attends=base_attends,
            discard_output=settings.discard_output,
            around=settings.around,
            rotary=self.rotary if _rotates(config, layer_number) else None,
            value_dim=inputs.value_dim,
            window=config.window_size[0] + 1 if now.windows and is_windowed(config, layer_number) else None,
            sinks=not base_attends and config.softmax_type != "vanilla",
        )
        _check(now, now_config, inputs, place)
        base, of_base = settings.base, settings.base_config
        if base is not now and not base.native:
            _check(base, of_base, inputs, place)
        layer = class_over(module, now.title)(config=config, layer_number=layer_number, **params, **kwargs)
        layer.settings, layer.place, layer.layers = settings, place, {}
        layer.variant, layer.variant_config, layer.streams = now, now_config, settings.streams
        if place.base_attends and of_te and not fp8.asked(config):  # of which more is said elsewhere
            say_once(te_choice(capability_of(here)))
        return over_tensor_ranks(layer, config)


def _rotates(config: TransformerConfig, layer_number: int) -> bool:
    """Whether this layer rotates queries and keys, where any does: multi-latent attention does not read `no_rope_freq`."""
    return config.multi_latent_attention or not config.no_rope_freq or not config.no_rope_freq[layer_number - 1]


def _check(variant: Variant, config: Any, inputs: RowKind, place: Place) -> None:
    """Name a backend that is missing, or a scheme that cannot be, before training starts."""
    variant.check_installed(config, inputs, place)
    if place.base_attends or place.exchange is None:
        return
    if problem := comm_type_problem(place.comm_type, inputs.heads, inputs.groups, place.exchange.size):
        raise ValueError(in_flags(problem))
