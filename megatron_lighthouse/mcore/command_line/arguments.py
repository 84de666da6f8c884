"""The seam to Megatron's own entry points: its parser takes our arguments, its model takes our layer spec."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_lighthouse.mcore.command_line import pyramid, rope, settings
from megatron_lighthouse.mcore.loop import selection_log
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.variants import VARIANTS, switching

ArgumentsProvider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def with_lighthouse_arguments(provider: ArgumentsProvider | None = None) -> ArgumentsProvider:
    """An `extra_args_provider` that adds `--attention` and `--lighthouse-*` after what `provider` adds."""

    def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return selection_log.add_arguments(settings.add_arguments(provider(parser) if provider else parser))

    return provide


def nothing_to_switch(args: argparse.Namespace) -> str | None:
    """Why --lighthouse-stage2-at means nothing to such an attention; None where it is not given, or nothing is trained."""
    if args.lighthouse_stage2_at is None or getattr(args, "skip_train", False):
        return None
    return (
        f"--lighthouse-stage2-at {args.lighthouse_stage2_at} makes Lighthouse layers dense, and with "
        f"--attention {args.attention} there are none: leave it out, or use {switching()}."
    )


def model_config(args: argparse.Namespace) -> Any:
    """Megatron's GPTModelConfig of `args`, and what it leaves out: --rope-scaling-factor."""
    from megatron.training.argument_utils import gpt_config_from_args

    model_cfg = gpt_config_from_args(args)
    if args.use_rope_scaling and args.rope_scaling_factor != model_cfg.rope_scaling_factor:
        say_once(
            f"--rope-scaling-factor {args.rope_scaling_factor} is taken; Megatron-LM's own pretrain_gpt.py of 0.19 takes "
            f"{model_cfg.rope_scaling_factor} whatever is given"
        )
        model_cfg.rope_scaling_factor = args.rope_scaling_factor
    return model_cfg


def use_attention(args: argparse.Namespace, model_cfg: Any) -> Any:
    """Give `model_cfg` (a GPTModelConfig) the attention that `--attention` names, checked against model and data.

    Raises:
        ValueError: settings, a model or data that Lighthouse refuses.
    """
    from megatron_lighthouse.mcore.attention.layer_specs import layer_spec, lighthouse
    from megatron_lighthouse.mcore.command_line.checks import check_run, copies_in_a_graph
    from megatron_lighthouse.mcore.loop import hooks

    spec, by_name = model_cfg.transformer_layer_spec, not VARIANTS[args.attention].native
    pyramid.settle(args)
    chosen = settings.settings_from(args) if by_name or spec is lighthouse else None
    if chosen is not None and chosen.attention.selects:
        chosen = rope.settled(args, chosen)
    else:
        rope.keep(args)
    if chosen is None or not chosen.attention.switches:
        if message := nothing_to_switch(args):
            raise ValueError(message)
        selection_log.say_nothing_is_logged(args)
    if chosen is None and spec is not None:
        return model_cfg
    if spec is not None and by_name:
        raise ValueError(f"--attention {args.attention} chooses the layer spec, and so does --spec: leave one of them out.")
    if (
        getattr(args, "reset_position_ids", False)
        and args.position_embedding_type in ("rope", "yarn", "none")
        and not args.rank
    ):
        kind = args.position_embedding_type
        say_once(f"--reset-position-ids changes nothing with --position-embedding-type {kind}, which does not read them.")
    config = model_cfg.transformer
    ours = config.context_parallel_size > 1 and config.transformer_impl == "local"
    if chosen is not None:
        check_run(args, config, chosen)
        if chosen.attention.selects:
            hooks.log_selection(args, chosen)
    elif ours and getattr(args, "reset_attention_mask", False):
        raise ValueError(
            "--reset-attention-mask separates documents by a mask, which context parallelism without Transformer Engine does "
            "not read: leave it out (documents in one sequence then attend to each other, as without it)."
        )
    elif ours and (message := copies_in_a_graph(config, settings.comm_types_of(config))):
        raise ValueError(message)
    if chosen is not None or ours:
        # the attention is causal and reads no mask; one of seq x seq bytes would not fit at long context
        args.create_attention_mask_in_dataloader = False
    if spec is None and (chosen is not None or config.sequence_parallel or config.context_parallel_size > 1):
        model_cfg.transformer_layer_spec = partial(layer_spec, settings=chosen)
    return model_cfg
