"""The seam to Megatron's own entry points: its parser takes our arguments, its model takes our layer spec."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line import documents, fp8, graphs, hybrid, layer_log, named, pyramid, rope, settings
from megatron_lighthouse.mcore.command_line.checks import run_problems
from megatron_lighthouse.mcore.command_line.layers import hybrid_pattern
from megatron_lighthouse.mcore.command_line.lengths import limits_of
from megatron_lighthouse.mcore.command_line.own_parts import (
    engine_problems,
    has_own_attention,
    learns_shared_sinks,
    over_shards_problems,
    scheme_problems,
)
from megatron_lighthouse.mcore.command_line.stage import SWITCHES
from megatron_lighthouse.mcore.loop import selection_log
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.variants import VARIANTS, switching

ArgumentsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def with_lighthouse_arguments(provider: ArgumentsProvider | None = None) -> ArgumentsProvider:
    """An `extra_args_provider` that adds `--attention` and `--lighthouse-*` after what `provider` adds."""

    def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return selection_log.add_arguments(settings.add_arguments(provider(parser) if provider else parser))

    return provide


def nothing_to_switch(args: argparse.Namespace) -> Iterator[str]:
    """Why a schedule means nothing to such an attention; nothing where none is given, or nothing is trained."""
    for name in () if getattr(args, "skip_train", False) else SWITCHES:
        if (iteration := getattr(args, f"lighthouse_{name}")) is not None:
            yield (
                f"{flag(name)} {iteration} makes Lighthouse layers dense, and with --attention {args.attention} there are "
                f"none: leave it out, or use {switching()}."
            )


def model_config(args: argparse.Namespace) -> Any:
    """Megatron's HybridModelConfig of `args` where these name a pattern of layers, else its GPTModelConfig.

    And what those leave out: the pattern, in the TransformerConfig, and --rope-scaling-factor.
    """
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    if hybrid_pattern(args):
        model_cfg = hybrid_config_from_args(args)
        model_cfg.transformer.hybrid_layer_pattern = args.hybrid_layer_pattern
        return model_cfg

    model_cfg = gpt_config_from_args(args)
    if args.use_rope_scaling and args.rope_scaling_factor != model_cfg.rope_scaling_factor:
        say_once(
            f"--rope-scaling-factor {args.rope_scaling_factor} is taken; Megatron-LM's own pretrain_gpt.py of 0.19 takes "
            f"{model_cfg.rope_scaling_factor} whatever is given"
        )
        model_cfg.rope_scaling_factor = args.rope_scaling_factor
    return model_cfg


def attention_problems(args: argparse.Namespace, config: Any, by_spec: bool, has_spec: bool) -> Iterator[str]:
    """Why the run does not have the attention that it asks for, in its model and with its data. Imports no Megatron.

    Args:
        config: a TransformerConfig, or what `config_of` makes of the arguments.
        by_spec: whether --spec names Lighthouse's; `has_spec`: whether it names any.
    """
    by_name = not VARIANTS[args.attention].native
    try:
        chosen = settings.settings_from(args) if by_name or by_spec else None
    except ValueError as error:
        yield str(error)
        return
    if chosen is None or not chosen.attention.switches:
        yield from nothing_to_switch(args)
    if chosen is None and has_spec:
        if documents.asked(args):
            yield f"{documents.flag_of(args)} needs core attention that takes documents, and --spec {args.spec} has its own."
        if learns_shared_sinks(config):
            yield (
                f"--softmax-type learnable with --tensor-model-parallel-size {config.tensor_model_parallel_size}: Megatron "
                "leaves the sinks of all ranks but the first out of the gradient's norm (Megatron-LM 7452), and so does the "
                f"core attention of --spec {args.spec}: leave --spec out, or use tensor-parallel size 1."
            )
        return
    if has_spec and by_name:
        yield f"--attention {args.attention} chooses the layer spec, and so does --spec: leave one of them out."
    if chosen is not None:
        if message := hybrid.attention_problem(args, args.attention):
            yield message
            return
        if chosen.attention.selects:
            chosen, _ = rope.taken(args, chosen)
        yield from run_problems(args, config, chosen)
        yield from named.option_problems(args, chosen.attention, chosen.base)
        if chosen.base.native and has_own_attention(config):  # of layers that stay dense, or see a window alone
            yield from over_shards_problems(config, dropout=0)  # which is refused already
        if chosen.attention.selects:
            yield from selection_log.problems(args, chosen)
        if chosen.base.logs:
            yield from layer_log.problems(args, chosen.base.name, chosen.base_config)
        return
    yield from named.option_problems(args)
    allowed = limits_of(args, config)
    yield from VARIANTS[args.attention].length_problems(None, args.seq_length, config.context_parallel_size, allowed)
    yield from documents.document_problems(args, config)
    yield from engine_problems(config)
    yield from fp8.problems(config)
    yield from fp8.run_problems(args, config)
    if has_own_attention(config):
        yield from over_shards_problems(config)
        yield from scheme_problems(config)
        kinds = settings.comm_types_of(config) if config.context_parallel_size > 1 else []
        yield from graphs.copies_problems(config, kinds)
        yield from graphs.beside_copies(args, config, kinds)


def config_of(args: argparse.Namespace) -> Any:
    """What the rules read of a TransformerConfig, of arguments that Megatron has not validated.

    As `core_transformer_config_from_args` of Megatron-core 0.19.2 names and changes them.
    """
    config = argparse.Namespace(**vars(args))
    config.num_query_groups = args.num_query_groups if args.group_query_attention else None
    config.num_moe_experts = args.num_experts
    config.cp_comm_type = args.cp_comm_type[0] if len(args.cp_comm_type) == 1 else args.cp_comm_type
    config.cuda_graph_impl = graphs.kind_of(args)
    return config


def megatron_masks(args: argparse.Namespace, config: Any) -> bool:
    """Whether Megatron's dense attention, in its own layer specs, is causal without a mask that it is given."""
    return not getattr(args, "reset_attention_mask", False) and not getattr(config, "experimental_attention_variant", None)


def use_attention(args: argparse.Namespace, model_cfg: Any) -> Any:
    """Give `model_cfg` (a GPTModelConfig or HybridModelConfig) the attention that `--attention` names, checked against both.

    Raises:
        ValueError: settings, a model or data that Lighthouse refuses.
    """
    from megatron_lighthouse.mcore.attention.layer_specs import hybrid_spec, layer_spec, lighthouse
    from megatron_lighthouse.mcore.loop import hooks

    is_hybrid = hybrid_pattern(args) is not None
    config, spec = model_cfg.transformer, model_cfg.hybrid_stack_spec if is_hybrid else model_cfg.transformer_layer_spec
    pyramid.settle(args)
    if found := [*dict.fromkeys(attention_problems(args, config, spec is lighthouse, spec is not None))]:
        raise ValueError(f"--attention {args.attention} cannot run as asked:\n  - " + "\n  - ".join(found))
    chosen = _settle(args, spec is lighthouse)
    if chosen is None and spec is not None:
        return model_cfg
    packs = documents.asked(args)
    _say_of_data(args, packs)
    if packs and config.apply_rope_fusion and max(args.micro_batch_size, args.eval_micro_batch_size) > 1:
        say_once(f"{documents.flag_of(args)}: the rows of a micro-batch have angles of their own, so RoPE is not fused.")
        config.apply_rope_fusion = False
    if chosen is not None or has_own_attention(config) or megatron_masks(args, config):
        # the attention is causal and reads no mask; one of seq x seq bytes would not fit at long context
        args.create_attention_mask_in_dataloader = False
    if is_hybrid and spec is None:
        hooks.stack_locally()
        model_cfg.hybrid_stack_spec = hybrid_spec(model_cfg, settings=chosen, documents=packs)
    elif spec is None and (
        chosen is not None
        or packs
        or config.sequence_parallel
        or config.context_parallel_size > 1
        or learns_shared_sinks(config)
        or config.multi_latent_attention
        or config.qk_l2_norm
        or fp8.asked(config)
    ):
        model_cfg.transformer_layer_spec = partial(layer_spec, settings=chosen, documents=packs)
    return model_cfg


def _settle(args: argparse.Namespace, by_spec: bool) -> settings.LighthouseSettings | None:
    """The settings of the attention that is asked for, whose logs and remarks begin here; None where it is Megatron's own."""
    from megatron_lighthouse.mcore.loop import hooks

    by_name = not VARIANTS[args.attention].native
    chosen = settings.settings_from(args) if by_name or by_spec else None
    if chosen is not None and chosen.attention.selects:
        chosen = rope.settled(args, chosen)
        hooks.log_selection(args, chosen)
    else:
        rope.keep(args)
    if chosen is not None and chosen.base.logs:
        hooks.log_layers(args, chosen)
    if chosen is not None and not getattr(args, "skip_train", False) and not args.rank:
        for remark in chosen.base.remarks(chosen.base_config, args):
            say_once(remark)
    if chosen is None or not chosen.attention.switches:
        selection_log.say_nothing_is_logged(args)
    return chosen


def _say_of_data(args: argparse.Namespace, packs: bool) -> None:
    """What the run's positions and packed documents come to."""
    if args.rank:
        return
    if getattr(args, "reset_position_ids", False) and (kind := args.position_embedding_type) in ("rope", "yarn", "none"):
        say_once(f"--reset-position-ids changes nothing with --position-embedding-type {kind}, which does not read them.")
    if packs:
        say_once(documents.remark(args))
