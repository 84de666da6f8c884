"""The schedule of one job: in which iteration which Lighthouse layers attend densely. Integers alone; imports no Megatron.

Iterations are counted from 1, as in Megatron's log.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lighthouse.lighthouse.config import flag

RETURNS = ("hard", "layers")
SWITCHES = ("dense_warmup_iters", "stage2_at")
"""What says when layers change."""


@dataclass(frozen=True)
class Schedule:
    """When Lighthouse layers are dense: in a warm-up, from stage 2 on, or in both. Fields are named as their flags.

    Raises:
        ValueError: when constructed, an iteration or a number of them below 1, or a warm-up that lasts into stage 2.
    """

    stage2_at: int | None = None
    """The last iteration in which all of them use Lighthouse (ITER); None where they stay with it."""
    return_iters: int = 1
    """Iterations that the return takes (M): from iteration stage2_at + return_iters on, all of them are dense."""
    dense_warmup_iters: int | None = None
    """The first iterations, in which all of them are dense (N); None where they begin with Lighthouse."""

    def __post_init__(self) -> None:
        for name, value, example in (
            ("dense_warmup_iters", self.dense_warmup_iters, 400),
            ("stage2_at", self.stage2_at, 40000),
            ("return_iters", self.return_iters, 100),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{flag(name)} {value} must be at least 1: use a number of iterations, such as {example}.")
        warmup, at = self.dense_warmup_iters, self.stage2_at
        if warmup is not None and at is not None and warmup >= at:
            use = f"{flag('dense_warmup_iters')} {at - 1} or less, or " if at > 1 else ""
            raise ValueError(
                f"{flag('dense_warmup_iters')} {warmup} leaves no iteration with Lighthouse before {flag('stage2_at')} {at}: "
                f"use {use}{flag('stage2_at')} {warmup + 1} or more."
            )

    @property
    def changes(self) -> dict[str, int]:
        """By flag, the last iteration before layers change; after it a checkpoint is saved."""
        given = {flag(name): getattr(self, name) for name in SWITCHES}
        return {name: at for name, at in given.items() if at is not None}

    def dense_layers(self, iteration: int, layers: int) -> int:
        """How many of `layers` Lighthouse layers, counted from the bottom, are dense in `iteration`. Ours.

        All in the warm-up. Then ceil(layers * (iteration - stage2_at) / return_iters), from 0 to `layers`. The lowest go first,
        so that what a dense layer reads is disturbed no more by a switch below it. (Which order is better was not measured.)
        """
        if self.dense_warmup_iters is not None and iteration <= self.dense_warmup_iters:
            return layers
        if self.stage2_at is None:
            return 0
        passed = min(max(0, iteration - self.stage2_at), self.return_iters)
        return -(-layers * passed // self.return_iters)

    def all_dense(self, iteration: int) -> bool:
        """Whether no layer uses Lighthouse in `iteration`, however many there are."""
        return self.dense_layers(iteration, self.return_iters) == self.return_iters

    def because(self, iteration: int) -> str:
        """The flag, with its value, by which layers are dense in `iteration`, or were last."""
        changes = [*self.changes.items()]
        name, at = next(((name, at) for name, at in reversed(changes) if at < iteration), changes[0])
        return f"{name} {at}"

    def problems(self, train_iters: int | None) -> Iterator[str]:
        """What does not fit into `train_iters` iterations; nothing where their number is not known."""
        if train_iters is None:
            return
        warmup = self.dense_warmup_iters or 0
        if self.stage2_at is None:
            if warmup >= train_iters:
                last = train_iters - 1
                use = f"at most {flag('dense_warmup_iters')} {last}" if last else f"at least --train-iters {warmup + 1}"
                yield (
                    f"{flag('dense_warmup_iters')} {warmup} leaves no iteration of --train-iters {train_iters} with "
                    f"Lighthouse: use {use}, or leave it out."
                )
            return
        end = self.stage2_at + self.return_iters
        if end <= train_iters:
            return
        last = train_iters - self.return_iters
        over = f" with {flag('return_iters')} {self.return_iters}" if self.return_iters > 1 else ""
        use = f"at most {flag('stage2_at')} {last}" if last > warmup else f"at least --train-iters {end}"
        yield (
            f"{flag('stage2_at')} {self.stage2_at}{over} leaves no iteration of --train-iters {train_iters} in which all "
            f"layers are dense: use {use}, or leave it out to stay with Lighthouse."
        )


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of the schedule to those of Lighthouse."""
    group.add_argument(
        flag("dense_warmup_iters"),
        type=int,
        metavar="N",
        help="Up to this iteration, and a checkpoint of it, Lighthouse layers attend densely. Default: none do.",
    )
    group.add_argument(
        flag("stage2_at"),
        type=int,
        metavar="ITER",
        help="After this iteration, and a checkpoint of it, Lighthouse layers attend densely, in the same job. Default: never.",
    )
    group.add_argument(
        flag("return"),
        choices=RETURNS,
        default="hard",
        help=f"How they become dense: all at once, or layer by layer from the bottom over {flag('return_iters')}. "
        "Default: %(default)s.",
    )
    group.add_argument(
        flag("return_iters"),
        type=int,
        metavar="M",
        help=f"Iterations after {flag('stage2_at')} until all layers are dense, with {flag('return')} layers.",
    )


def schedule_from(args: argparse.Namespace) -> Schedule | None:
    """The schedule that parsed arguments ask for; None where layers use Lighthouse throughout.

    Raises:
        ValueError: arguments that do not go together, or a value that cannot be.
    """
    at, how, over = args.lighthouse_stage2_at, args.lighthouse_return, args.lighthouse_return_iters
    if at is None and (how != "hard" or over is not None):
        given = f"{flag('return')} {how}" if how != "hard" else f"{flag('return_iters')} {over}"
        raise ValueError(f"{given} says how layers become dense, and nothing says when: add {flag('stage2_at')} ITER.")
    if how == "hard" and over is not None:
        raise ValueError(
            f"{flag('return_iters')} {over} has no meaning with {flag('return')} hard, which takes one iteration: leave it "
            f"out, or use {flag('return')} layers."
        )
    if how == "layers" and over is None:
        raise ValueError(
            f"{flag('return')} layers needs the number of iterations that it takes: add {flag('return_iters')} M, such as 100."
        )
    warmup = args.lighthouse_dense_warmup_iters
    return None if at is None and warmup is None else Schedule(at, 1 if over is None else over, warmup)
