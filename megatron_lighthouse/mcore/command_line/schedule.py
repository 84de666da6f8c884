"""The learning rate and the weight decay over a run: what Megatron refuses without a remedy, or late, or does not read.

Imports no Megatron.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_lighthouse.usage import as_flag

COUNTED = ("lr_decay", "lr_warmup", "lr_wsd_decay")
"""What is counted in iterations or in samples, as training itself is: arguments, before `_iters` and `_samples`."""


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Why Megatron would not train by it.

    Args:
        args: as the words say, not validated.
    """
    yield from _rates(args)
    yield from _weight_decay(args)
    yield from _unit(args)
    yield from _warm_up(args)
    yield from _fall(args)


def _units(args: argparse.Namespace) -> tuple[str, str]:
    """The unit in which the run counts, and the other."""
    return ("samples", "iters") if args.train_samples and not args.train_iters else ("iters", "samples")


def _length(args: argparse.Namespace) -> tuple[int | None, str, str]:
    """The steps in which the rate decays, in the run's unit; that unit, and the words for these."""
    unit = _units(args)[0]
    steps = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    name = "iterations" if unit == "iters" else unit
    return steps, unit, f"{steps} {name} of --lr-decay-{unit} (where not given, --train-{unit})"


def _rates(args: argparse.Namespace) -> Iterator[str]:
    if args.lr is None:
        yield "--lr is missing: give a learning rate, such as 3e-4."
    elif args.lr < 0:
        yield f"--lr {args.lr} must not be negative: use a learning rate such as 3e-4."
    elif not 0 <= args.min_lr <= args.lr or not 0 <= args.lr_warmup_init <= args.lr:
        use = " and ".join(
            f"{as_flag(name)} {args.lr / 10 if name == 'min_lr' else 0:g}"
            for name in ("min_lr", "lr_warmup_init")
            if not 0 <= getattr(args, name) <= args.lr
        )
        yield (
            f"--lr {args.lr} must be at least --min-lr {args.min_lr} and --lr-warmup-init {args.lr_warmup_init}, and none of "
            f"them negative: use {use}, or a greater --lr."
        )


def _weight_decay(args: argparse.Namespace) -> Iterator[str]:
    style, start, end = args.weight_decay_incr_style, args.start_weight_decay, args.end_weight_decay
    if style == "constant":
        if (start, end) != (None, None):
            yield (
                "--start-weight-decay and --end-weight-decay mean nothing with --weight-decay-incr-style constant: use linear."
            )
    elif start is None or end is None:
        yield f"--weight-decay-incr-style {style} needs --start-weight-decay and --end-weight-decay: add both."
    elif end < start:
        yield (
            f"--end-weight-decay {end} must be at least --start-weight-decay {start}, for it grows: use --start-weight-decay "
            f"{end} --end-weight-decay {start}, or --weight-decay alone."
        )


def _unit(args: argparse.Namespace) -> Iterator[str]:
    """Of a run that counts iterations, what is given in samples, and the other way round."""
    (unit, other), batch = _units(args), args.global_batch_size
    for name in COUNTED if args.train_iters or args.train_samples else ():
        if not (given := getattr(args, f"{name}_{other}")):
            continue
        own = getattr(args, f"{name}_{unit}") or (args.lr_warmup_fraction if name == "lr_warmup" else None)
        if own or (name == "lr_wsd_decay" and args.lr_decay_style != "WSD"):
            use = "leave it out"
        else:
            steps = given * (batch or 1) if unit == "samples" else max(1, round(given / (batch or 1)))
            use = f"use {as_flag(name)}-{unit} {steps if batch else 'N'} in its place"
        yield f"{as_flag(name)}-{other} {given} is not read beside --train-{unit} {getattr(args, f'train_{unit}')}: {use}."


def _warm_up(args: argparse.Namespace) -> Iterator[str]:
    decays, unit, what = _length(args)
    warms, share = getattr(args, f"lr_warmup_{unit}"), args.lr_warmup_fraction
    if share is not None and not 0 <= share < 1:
        yield f"--lr-warmup-fraction {share} must be from 0 up to, not including, 1: use 0.02."
    elif share is not None and warms and decays:
        use = warms / decays if warms < decays else share
        yield (
            f"--lr-warmup-{unit} {warms} and --lr-warmup-fraction {share:g}, which a recipe may give, exclude each other: use "
            f"--lr-warmup-fraction {use:.3g} alone, or a recipe without the fraction."
        )
    elif decays and warms and warms >= decays:
        yield (
            f"--lr-warmup-{unit} {warms} must be below the {what}: use {max(decays // 50, min(1, decays - 1))} or so, or "
            "--lr-warmup-fraction 0.02 alone."
        )


def _fall(args: argparse.Namespace) -> Iterator[str]:
    """Of WSD, whose rate falls in the last steps."""
    if args.lr_decay_style != "WSD":
        return
    decays, unit, what = _length(args)
    falls, other = (getattr(args, f"lr_wsd_decay_{name}") for name in _units(args))
    if falls is None and other is None:
        last = "iterations" if unit == "iters" else unit
        yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}: add the number of last {last} in which the rate falls."
    elif decays and falls and falls > decays:
        yield f"--lr-wsd-decay-{unit} {falls} must be at most the {what}: use {max(1, decays // 20)} or so."
