"""Whether a run can go on from its checkpoint with the optimizer and the learning rate it asks for. Imports no Megatron.

Megatron finds out when ranks and memory are taken, and ends with a status that a job requeues.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line import stored
from megatron_lighthouse.mcore.command_line.layers import hybrid_pattern, written_pattern
from megatron_lighthouse.options import read_options, set_options
from megatron_lighthouse.variant import Stream, Variant, norm_of
from megatron_lighthouse.variants import DENSE, VARIANTS, base_in, named_in

OVERRIDE, KEEP = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"

FLAGS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters, -samples or -fraction",
    "lr_decay_steps": "--train-iters, --lr-decay-iters or --global-batch-size",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--weight-decay or --start-weight-decay",
    "end_wd": "--weight-decay or --end-weight-decay",
    "wd_incr_steps": "--train-iters or --global-batch-size",
    "wd_incr_style": "--weight-decay-incr-style",
}
"""What Megatron compares of its `OptimizerParamScheduler`'s state, and what it is made of. Steps are samples."""
OF_GROUPS = {"decoupled_lr": "--decoupled-lr", "decoupled_min_lr": "--decoupled-min-lr"}
"""Rates of some parameters alone: in the stored arguments, not in the schedule."""
OF_ADAM = ("adam_beta1", "adam_beta2", "adam_eps")
OF_OPTIMIZER = {"adam": OF_ADAM, "sgd": ("sgd_momentum",), "muon": ("muon_momentum", *OF_ADAM)}
"""What torch takes from the state of an optimizer that goes on. Muon leaves vectors to Adam."""


OF_ATTENTION: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("qk_layernorm", bool, "weights of these norms", "--qk-layernorm"),
    ("softmax_type", lambda kind: kind == "learnable", "sinks", "--softmax-type learnable"),
)
"""Options that give attention weights: when, which, and the words."""
LENIENT = ("log_all", "ignore_all")
"""Of --dist-ckpt-strictness: what a checkpoint lacks begins anew."""


def check_resume(args: argparse.Namespace) -> None:
    """Refuse a run that cannot go on from its checkpoint, before the process group exists.

    Raises:
        ValueError: why not, and what works.
    """
    start = stored.before(args, *stored.folders(args))
    if start is not None and not start.state and (start.checkpoint / stored.METADATA).is_file():
        stored.read_metadata(start.checkpoint)
    if found := [*_problems(args, start)]:
        raise ValueError("\n".join(found))


def problems(args: argparse.Namespace, load: Path | None, pretrained: Path | None = None) -> Iterator[str]:
    """Why a run does not go on from its last checkpoint, or does not begin with the weights of another.

    Args:
        args: Megatron's, validated or not.
        load, pretrained: --load and --pretrained-checkpoint, where this machine has them. Of one that this machine's torch
            cannot read nothing is said: the run's may.
    """
    yield from _problems(args, stored.before(args, load, pretrained))


def _problems(args: argparse.Namespace, start: stored.Before | None) -> Iterator[str]:
    if start is None or not start.state:
        return
    before, folder = start.args, start.folder
    begins = argparse.Namespace(**{**vars(args), "finetune": start.begins})
    yield from attention_problems(begins, before, folder, start.checkpoint)
    if args.skip_train or start.begins:
        return
    yield from _other_warmup(args, before, start)
    if args.no_load_optim:
        return
    if getattr(before, "no_save_optim", False):
        yield (
            f"{folder} was saved with --no-save-optim, so that no run goes on from it: add --no-load-optim, and the optimizer "
            "begins anew."
        )
        return
    yield from _other_optimizer(args, before, folder)
    was = getattr(before, "decoupled_lr", args.decoupled_lr)
    if (was is None) != (args.decoupled_lr is None):
        yield (
            f"--decoupled-lr {args.decoupled_lr} makes other groups of parameters than the checkpoint in {folder} has "
            f"({was}): {'add it again' if args.decoupled_lr is None else 'leave it out'}, or add "
            "--no-load-optim, and the optimizer begins anew."
        )
    elif not args.override_opt_param_scheduler and not args.use_checkpoint_opt_param_scheduler:
        yield from _other_rates(args, start.state, folder)


def attention_problems(args: argparse.Namespace, before: Any, folder: Path, checkpoint: Path) -> Iterator[str]:
    """Why the model of --attention does not take the weights, or the optimizer, of a checkpoint of another attention.

    Args:
        before: the checkpoint's arguments; None, and without an attention, where another program wrote it.
        folder: of checkpoints, in which `checkpoint` is.
    """
    if not getattr(args, "use_checkpoint_args", False):  # else the model is the checkpoint's, whatever the words say
        yield from _other_weights(args, before, folder)
        yield from _other_layers(args, before, folder)
    if getattr(before, "attention", None) is None or getattr(args, "attention", None) is None:
        return
    old, new = base_in(before), base_in(args)
    if old is None:
        known = " or ".join(VARIANTS)
        yield f"the checkpoint in {folder} is of --attention {before.attention}, which is not known here: use {known}."
        return
    if old is new:
        yield from _other_columns(old, args, before, folder)
    if old is new or new is None:
        return
    was, now = named_in(before), named_in(args)
    had, has = ({stream.name for stream in base.streams} for base in (old, new))
    lost = [stream for stream in old.streams if stream.name in had - has and not old.dense_weights]
    if lost and not getattr(args, "drop_attention_weights", False) and not all(_is_zero(checkpoint, one) for one in lost):
        yield (
            f"the checkpoint in {folder} is of --attention {was}, whose weights go with no other: use --attention {was}, or "
            f"add --drop-attention-weights to lose {', '.join(f'linear_{one.name}' for one in lost)} and what it did."
        )
    elif had != has and (kind := stored.other_format(checkpoint)):
        yield (
            f"the checkpoint in {folder} is of --attention {was} and of the format {kind}, whose weights Megatron gives to no "
            f"other attention: write it again first, with --attention {was} --ckpt-convert-format torch_dist "
            "--ckpt-convert-save FOLDER, and load that."
        )
    elif had != has and not (args.skip_train or args.finetune or args.no_load_optim):
        yield (
            f"the checkpoint in {folder} is of --attention {was}, so that its optimizer knows other weights than --attention "
            f"{now} has: add --no-load-optim, and the optimizer begins anew."
        )


def _other_weights(args: argparse.Namespace, before: Any, folder: Path) -> Iterator[str]:
    """Weights of attention for an option's sake: Megatron drops without a word what the model lacks, and ends late without
    what the checkpoint lacks."""
    for name, has, what, words in OF_ATTENTION:
        was, now = (getattr(one, name, None) for one in (before, args))
        if was is None or now is None or has(was) == has(now):
            continue
        if has(was) and not getattr(args, "drop_attention_weights", False):
            yield (
                f"the checkpoint in {folder} was trained with {words}, and this model has no {what}: add {words}, or "
                "--drop-attention-weights to lose them and what they did."
            )
        elif has(now) and getattr(args, "dist_ckpt_strictness", None) not in LENIENT:
            yield f"the checkpoint in {folder} was trained without {words}, and has no {what}: leave it out, or begin anew."
        elif getattr(args, "use_distributed_optimizer", False) and not (args.skip_train or args.finetune or args.no_load_optim):
            given = "with" if has(was) else "without"
            yield (
                f"the checkpoint in {folder} was trained {given} {words}, and the state of --use-distributed-optimizer is of "
                "other sizes than this model's: add --no-load-optim, and the optimizer begins anew."
            )


def _other_layers(args: argparse.Namespace, before: Any, folder: Path) -> Iterator[str]:
    """Of hybrid models, whose weights are named by the numbers of their layers."""
    was, now = hybrid_pattern(before), hybrid_pattern(args)
    if was and now and was != now:
        given = written_pattern(args)[0]
        yield f"the checkpoint in {folder} is of layers {was}, and {given} of {now}: give its own, with | where you want them."


def _other_warmup(args: argparse.Namespace, before: Any, start: stored.Before) -> Iterator[str]:
    """A dense warm-up that ends elsewhere, once past the earlier end: iterations were, or would be, of the other attention.

    Up to there another end changes nothing that was trained. Without a warm-up it is 0.
    """
    was, now = (getattr(one, "lighthouse_dense_warmup_iters", None) or 0 for one in (before, args))
    kinds = (VARIANTS.get(getattr(one, "attention", None) or DENSE.name, DENSE) for one in (before, args))
    if not all(end or kind.switches for end, kind in zip((was, now), kinds, strict=True)):
        return  # one of the two is a dense stage, in a job of its own
    if was != now and start.iteration > min(was, now):
        name = flag("dense_warmup_iters")
        yield (
            f"the checkpoint in {start.folder} is of iteration {start.iteration} and was trained with {name} {was or 'none'}, "
            f"and this run has {now or 'none'}, which would change what is dense after it began: "
            f"{f'give {name} {was}' if was else 'leave it out'}, or begin a new run with --finetune."
        )


def _other_columns(base: Variant, args: argparse.Namespace, before: Any, folder: Path) -> Iterator[str]:
    """Streams whose columns are of other heads or channels than they were: of some sizes their shape is the same."""
    if base.config is None:
        return
    was, now = (
        {one.name: (one.per_group, one.per_channel, one.paired) for one in base.streams_of(config)}
        for config in (read_options(given, base.name, base.config) for given in (before, args))
    )
    if names := [f"linear_{name}" for name in was.keys() & now.keys() if was[name] != now[name]]:
        had, has = ({*set_options(given, base.name, base.config)} for given in (before, args))
        yield (
            f"the columns of {', '.join(names)} in {folder} are of other heads or channels than this run's: it was trained "
            f"with {', '.join(sorted(had - has)) or 'defaults'}, and this has {', '.join(sorted(has - had)) or 'defaults'}. "
            "Give what it was."
        )


def _is_zero(checkpoint: Path, stream: Stream) -> bool:
    """Whether a stream is 0 whatever its input, in all layers of a checkpoint: by its norm's weights, or its own."""
    modules = (f"self_attention.{norm_of(stream)}.", f"self_attention.linear_{stream.name}.")
    return any(stored.is_zero(checkpoint, module) for module in modules)


def _other_optimizer(args: argparse.Namespace, before: Any, folder: Path) -> Iterator[str]:
    kind = args.optimizer.removeprefix("dist_")  # as Megatron writes Muon's
    asked = {"optimizer": kind, **{name: getattr(args, name) for name in OF_OPTIMIZER.get(kind, ())}}
    pairs = [(f"--{name.replace('_', '-')}", now, getattr(before, name, None)) for name, now in asked.items()]
    if differ := [f"{option} ({now}, was {was})" for option, now, was in pairs if was not in (None, now)]:
        yield (
            f"the optimizer in {folder} goes on as it was, whatever is asked for: with {'; '.join(differ)} give what it was, "
            "or add --no-load-optim, and the optimizer begins anew."
        )
    elif asked["optimizer"] in ("adam", "sgd") and not getattr(args, "use_megatron_fsdp", False):  # others may settle it later
        yield from _other_state(args, before, folder)


def _other_state(args: argparse.Namespace, before: Any, folder: Path) -> Iterator[str]:
    """Whether the optimizer's state would be made of other tensors: Megatron reads none of another form, and none of SGD."""
    if args.optimizer == "sgd" and getattr(before, "ckpt_format", None) == "torch_dist":
        yield (
            f"--optimizer sgd cannot go on with its state in {folder}, which Megatron-core 0.19 does not load from "
            "--ckpt-format torch_dist: add --no-load-optim, and momentum begins anew."
        )
        return
    shared = getattr(before, "use_distributed_optimizer", args.use_distributed_optimizer)
    half, was_half = (bool(getattr(one, "bf16", args.bf16) or getattr(one, "fp16", args.fp16)) for one in (args, before))
    if args.use_distributed_optimizer != shared:
        what, was = "--use-distributed-optimizer", shared
    elif half != was_half and not shared:
        what, was = "--bf16 or --fp16", was_half
    else:
        return
    given, use = ("with", "add it") if was else ("without", "leave it out")
    yield (
        f"the optimizer in {folder} was saved {given} {what}, and its state is of that form alone: {use}, or add "
        "--no-load-optim, and the optimizer begins anew."
    )


def _other_rates(args: argparse.Namespace, state: Mapping[str, Any], folder: Path) -> Iterator[str]:
    pairs = [
        (FLAGS[name], value, state.get("opt_param_scheduler", {}).get(name, value)) for name, value in schedule(args).items()
    ]
    now, was = vars(args), vars(state.get("args") or args)
    pairs += [(option, now[name], was.get(name, now[name])) for name, option in OF_GROUPS.items()]
    if differ := [f"{option} ({asked}, was {before}{_unit(option)})" for option, asked, before in pairs if asked != before]:
        yield (
            f"the checkpoint in {folder} was trained with another {'; '.join(differ)}: add {OVERRIDE} to go on with what is "
            f"asked for, {KEEP} to go on with the checkpoint's, or give what it was. Either keeps the optimizer's moments."
        )


def _unit(option: str) -> str:
    return " samples" if option in {FLAGS[name] for name in FLAGS if name.endswith("_steps")} else ""


def schedule(args: argparse.Namespace) -> dict[str, Any]:
    """What Megatron would make of the arguments, by the names of `FLAGS`, as far as it is known.

    The formulas are those of `get_optimizer_param_scheduler` in Megatron-core 0.19.2.
    """
    constant = args.weight_decay_incr_style == "constant"
    found = {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.weight_decay if constant else args.start_weight_decay,
        "end_wd": args.weight_decay if constant else args.end_weight_decay,
        "wd_incr_style": args.weight_decay_incr_style,
    }
    if args.train_iters:
        unit, end, decay, warmup = args.global_batch_size, args.train_iters, args.lr_decay_iters, args.lr_warmup_iters
    else:
        unit, end, decay, warmup = 1, args.train_samples, args.lr_decay_samples, args.lr_warmup_samples
    if unit and end:
        steps = (decay or end) * unit
        found |= {"lr_decay_steps": steps, "wd_incr_steps": end * unit}
        found["lr_warmup_steps"] = warmup * unit if args.lr_warmup_fraction is None else args.lr_warmup_fraction * steps
    return {name: value for name, value in found.items() if value is not None}
