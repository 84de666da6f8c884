"""Layer specs: Megatron's own, with Lighthouse as the core attention of the layers that take it.

`--spec megatron_lighthouse.mcore.spec lighthouse` works in any Megatron-core 0.19 run; options come from the
command line or, where its parser does not know them, from the environment variable LIGHTHOUSE_ARGS.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_lighthouse.context_parallel.copies import copies_over
from megatron_lighthouse.gpu import capability_of
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.mcore.attention.copied import copied
from megatron_lighthouse.mcore.attention.core_attention import CoreAttentionBuilder
from megatron_lighthouse.mcore.attention.document_latent import latent_of_documents
from megatron_lighthouse.mcore.attention.fused import of_documents
from megatron_lighthouse.mcore.attention.norm import take_l2_norms, take_torch_norms, torch_norm
from megatron_lighthouse.mcore.attention.output import without_kept_output
from megatron_lighthouse.mcore.attention.over_shards import able_local
from megatron_lighthouse.mcore.attention.rotary import rotary_of
from megatron_lighthouse.mcore.attention.scales import with_scales
from megatron_lighthouse.mcore.attention.streams import add_streams
from megatron_lighthouse.mcore.attention.tensor_ranks import OverTensorRanks
from megatron_lighthouse.mcore.command_line import fp8, precision, rope
from megatron_lighthouse.mcore.command_line.checks import check_run
from megatron_lighthouse.mcore.command_line.documents import asked, upstream_problems
from megatron_lighthouse.mcore.command_line.layers import attention_layers
from megatron_lighthouse.mcore.command_line.own_parts import learns_shared_sinks
from megatron_lighthouse.mcore.command_line.settings import (
    LighthouseSettings,
    head_dims,
    heads_of_rank,
    own_comm_types,
    settings_by_spec,
    settings_from,
)
from megatron_lighthouse.mcore.global_args import global_args
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.versions import cudnn

type LayerSpec = ModuleSpec | TransformerBlockSubmodules


def with_lighthouse(spec: LayerSpec, settings: LighthouseSettings, rotary: Rotary | None = None) -> LayerSpec:
    """A copy of a GPT layer or block spec or a hybrid stack's, local or Transformer Engine, whose core attention is Lighthouse.

    Whether a layer is Lighthouse or dense is decided when it is built, from its global number, so the spec is right on
    every pipeline stage.

    Args:
        rotary: what the model rotates queries and keys by, where a layer must know it, as for `rope` "last": `rotary_of` its
            configuration.

    Raises:
        ValueError: an option that needs `rotary` without it, or does not go with it; a layer spec without a core attention; a
            block spec of which some layers have none, where `settings` does not say which of the model's layers those are.
    """
    needs = rope.rotary_option(settings)
    if needs is not None and rotary is None:
        raise ValueError(
            f"{needs} needs to know what the model rotates queries and keys by, and a layer spec does not say: "
            "give with_lighthouse(spec, settings, rotary_of(model_cfg)) the model's configuration (megatron_lighthouse.mcore."
            f"attention.rotary), or {f'use {rope.FLAG} {rope.MEAN}' if needs.startswith(rope.FLAG) else 'leave it out'}."
        )
    if needs is not None and (problems := [*rope.last_problems(settings)]):
        raise ValueError("\n".join(problems))
    spec = copied(spec)
    # a hybrid stack has a layer of MLA too, whose model is refused when its core attention is built
    for layer in [spec.submodules.attention_layer] if _is_hybrid(spec) else _layers_of(spec):
        add_streams(layer.submodules, settings)
    found = 0
    for submodules in attentions_of(spec):
        if not isinstance(submodules.core_attention, CoreAttentionBuilder):
            submodules.core_attention = CoreAttentionBuilder(
                submodules.core_attention, settings, None if needs is None else rotary
            )
            if settings.discard_output:
                submodules.linear_proj = without_kept_output(submodules.linear_proj)
        found += 1
    if settings.attention_layers is None and found < len(_layers_of(spec)) and isinstance(spec, TransformerBlockSubmodules):
        raise ValueError(
            f"{len(_layers_of(spec)) - found} of {len(_layers_of(spec))} layers of the block spec hold no core attention, so "
            "that their numbers do not say which are first and last: give the numbers of those that do in the whole model, as "
            "LighthouseSettings(attention_layers=…), or settings_from(args) with Megatron's arguments."
        )
    # a block spec is one pipeline stage's part, which may hold no attention at all
    if not found and isinstance(spec, ModuleSpec):
        raise ValueError(
            f"--attention {settings.variant} found no core attention in the layer spec of {spec.module.__name__}: it takes "
            "GPT layer specs and hybrid stacks (local or transformer_engine)."
        )
    if global_args() is not None:
        from megatron_lighthouse.mcore.loop import hooks

        hooks.follow_switch(settings)
        hooks.load_weights()
    return spec


def lighthouse(model_cfg: Any, vp_stage: int | None = None) -> LayerSpec:
    """For `--spec megatron_lighthouse.mcore.spec lighthouse`, and for `GPTModelConfig.transformer_layer_spec`.

    Raises:
        ValueError: settings, a model or data that Lighthouse refuses.
    """
    args = global_args()
    # upstream's parser does not know our options
    found = [] if args is None or hasattr(args, "attention") else [*upstream_problems(args, model_cfg.transformer)]
    if found:
        raise ValueError("\n".join(found))
    settings = settled(args, model_cfg.transformer)
    return layer_spec(model_cfg, vp_stage, settings=settings, documents=args is not None and asked(args))


def settled(args: Namespace | None, config: TransformerConfig) -> LighthouseSettings:
    """What `--spec` asks of Lighthouse, checked against the run that Megatron's arguments describe, where there are any."""
    if args is None:
        return settings_from(args)
    settings = settings_by_spec(args)
    check_run(args, config, settings)
    return settings


def hybrid_spec(model_cfg: Any, *, settings: LighthouseSettings | None, documents: bool = False) -> ModuleSpec:
    """The stack's spec for `model_cfg` (a HybridModelConfig); with `settings`, its attention layers made Lighthouse.

    Args:
        documents: whether rows hold packed documents.

    Raises:
        ValueError: a model that Lighthouse refuses.
    """
    from megatron_lighthouse.mcore.attention.hybrid_specs import hybrid_stack

    config = model_cfg.transformer
    spec = hybrid_stack(config)
    if documents:
        take_documents(spec, config.context_parallel_size)
    spec = _with_attention(spec, model_cfg, settings)
    assert isinstance(spec, ModuleSpec)
    return spec


def layer_spec(
    model_cfg: Any, vp_stage: int | None = None, *, settings: LighthouseSettings | None, documents: bool = False
) -> LayerSpec:
    """The spec that Megatron would use for `model_cfg` (a GPTModelConfig); with `settings`, made Lighthouse.

    Args:
        documents: whether rows hold packed documents.

    Raises:
        ValueError: a model that Lighthouse refuses.
    """
    from megatron.training.models.gpt import default_layer_spec

    config: TransformerConfig = model_cfg.transformer
    # upstream's specs raise in Megatron's own words where they cannot build, so ask for them first
    spec = default_layer_spec(model_cfg, vp_stage)
    if config.sequence_parallel:
        spec = _with_sequence_parallel_norm(spec, config, vp_stage)
    if config.qk_l2_norm:
        spec = copied(spec)
        for submodules in attentions_of(spec):
            take_l2_norms(submodules)
    if documents:
        spec = _with_documents(spec, config)
    return _with_attention(spec, model_cfg, settings)


def _with_attention(spec: LayerSpec, model_cfg: Any, settings: LighthouseSettings | None) -> LayerSpec:
    config = model_cfg.transformer
    _check_fp8(config)
    if settings is None:
        return dense(spec, config)
    _say_what_is_sent(config, settings)
    rotary = None if rope.rotary_option(settings) is None else rotary_of(model_cfg)
    if rotary is None:  # nothing is rotated, or nothing turned
        settings = replace(settings, rope=rope.MEAN)
    holding = attention_layers(config, settings.attention.windows)
    return with_lighthouse(spec, replace(settings, attention_layers=holding), rotary)


def _say_what_is_sent(config: TransformerConfig, settings: LighthouseSettings) -> None:
    """One line, where this project's own attention crosses context-parallel ranks; Transformer Engine's does it its own way."""
    args, size = global_args(), config.context_parallel_size
    comm_types = own_comm_types(config, settings)
    if args is None or not comm_types:
        return
    dim, value_dim = head_dims(config)
    shared = getattr(settings.in_model(config).config, "heads_per_selection", 0) or 1
    layer = Shape(args.micro_batch_size, *heads_of_rank(config), dim, config.params_dtype.itemsize, value_dim, shared)
    edges = {"edge layers: ": settings.edge} if settings.edge else {}
    for kind, own in {} if asked(args) else {"": settings.config, **edges}.items():  # of documents it goes by their lengths
        for comm_type in comm_types:
            say_once(kind + settings.attention.summary(own, args.seq_length, layer, size, comm_type, settings.around))
    if "p2p" in comm_types and torch.cuda.is_available():  # which of two ways it takes is said at the start, not later
        copies_over(parallel_state.get_context_parallel_group(), torch.device("cuda", torch.cuda.current_device()))


def _check_fp8(config: TransformerConfig) -> None:
    """Raises ValueError where layers or their attention are to be in FP8, and these GPUs have none so."""
    here = capability_of(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else 0
    if found := [*precision.device_problems(config, *divmod(here, 10)), *fp8.device_problems(config, here // 10, cudnn())]:
        raise ValueError("\n".join(found))
    if fp8.asked(config):
        say_once(fp8.EXPERIMENTAL)


def dense(spec: LayerSpec, config: TransformerConfig) -> LayerSpec:
    """The spec of a dense model, whose core attention, where it is Megatron's local one, can do what the model asks for."""
    latent = config.multi_latent_attention
    differs = learns_shared_sinks(config) or (latent and config.tensor_model_parallel_size > 1)
    if config.context_parallel_size == 1 and not differs and not latent and not fp8.asked(config):
        return spec
    spec = copied(spec)
    for submodules in attentions_of(spec):
        if isinstance(submodules.core_attention, OverTensorRanks):  # layers of a block may share a spec
            continue
        core_attention = with_scales(able_local(submodules.core_attention, config), config)
        submodules.core_attention = OverTensorRanks(core_attention) if differs else core_attention
    return spec


def _with_documents(spec: LayerSpec, config: TransformerConfig) -> LayerSpec:
    """The spec with core attention that takes packed documents: of one rank, for `able_local` puts its own in its place."""
    spec = copied(spec)
    take_documents(spec, config.context_parallel_size)
    return spec


def take_documents(spec: LayerSpec, ranks: int = 1) -> None:
    """Put attention that takes packed documents into a spec that is nobody else's."""
    for layer in _layers_of(spec):
        layer.submodules.self_attention = latent_of_documents(layer.submodules.self_attention)
    for submodules in attentions_of(spec):
        if ranks == 1:
            submodules.core_attention = of_documents(submodules.core_attention)


def _with_sequence_parallel_norm(spec: LayerSpec, config: TransformerConfig, vp_stage: int | None) -> LayerSpec:
    """Where Megatron would take torch's norm, which refuses sequence parallelism, take one that works."""
    if isinstance(spec, ModuleSpec):
        if spec.submodules.input_layernorm is not WrappedTorchNorm:
            return spec
        layers = [spec] * get_num_layers_to_build(config, vp_stage)
        spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=WrappedTorchNorm)
    spec = copied(spec)
    if spec.layer_norm is WrappedTorchNorm:
        spec.layer_norm = torch_norm
    for layer in _layers_of(spec):
        take_torch_norms(layer.submodules)
    return spec


def attentions_of(spec: LayerSpec) -> Iterator[Any]:
    """The submodules of each layer's self-attention that has a core attention among them."""
    for layer in _layers_of(spec):
        attention = getattr(layer.submodules, "self_attention", None)
        submodules = getattr(attention, "submodules", None)
        if submodules is not None and hasattr(submodules, "core_attention"):
            yield submodules


def _is_hybrid(spec: LayerSpec) -> bool:
    return isinstance(spec, ModuleSpec) and hasattr(spec.submodules, "attention_layer")


def _layers_of(spec: LayerSpec) -> list[ModuleSpec]:
    if _is_hybrid(spec):
        return [spec.submodules.attention_layer, spec.submodules.mla_layer]
    return [spec] if isinstance(spec, ModuleSpec) else list(spec.layer_specs or [])
