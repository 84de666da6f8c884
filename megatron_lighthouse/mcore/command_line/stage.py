"""Stage 2 within one job: in which iteration which Lighthouse layers attend densely. Integers alone; imports no Megatron.

Iterations are counted from 1, as in Megatron's log.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lighthouse.lighthouse.config import flag

RETURNS = ("hard", "layers")


@dataclass(frozen=True)
class Stage2:
    """When Lighthouse layers become dense, and stay so.

    Raises:
        ValueError: when constructed, an iteration or a number of them below 1.
    """

    at: int
    """The last iteration in which all of them use Lighthouse (ITER)."""
    over: int = 1
    """Iterations that the return takes (M): from iteration at + over on, all of them are dense."""

    def __post_init__(self) -> None:
        for name, value, example in (("stage2_at", self.at, 40000), ("return_iters", self.over, 100)):
            if value < 1:
                raise ValueError(f"{flag(name)} {value} must be at least 1: use a number of iterations, such as {example}.")

    def dense_layers(self, iteration: int, layers: int) -> int:
        """How many of `layers` Lighthouse layers, counted from the bottom, are dense in `iteration`. Ours.

        ceil(layers * (iteration - at) / over), from 0 to `layers`. The lowest go first, so that what a dense layer reads is
        disturbed no more by a switch below it. (Which order is better has not been measured.)
        """
        passed = min(max(0, iteration - self.at), self.over)
        return -(-layers * passed // self.over)

    def problems(self, train_iters: int | None) -> Iterator[str]:
        """What does not fit into `train_iters` iterations; nothing where their number is not known."""
        if train_iters is None or self.at + self.over <= train_iters:
            return
        last, over = train_iters - self.over, f" with {flag('return_iters')} {self.over}" if self.over > 1 else ""
        use = f"at most {flag('stage2_at')} {last}" if last >= 1 else f"at least --train-iters {self.at + self.over}"
        yield (
            f"{flag('stage2_at')} {self.at}{over} leaves no iteration of --train-iters {train_iters} in which all layers are "
            f"dense: use {use}, or leave it out to stay with Lighthouse."
        )


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments of stage 2 to those of Lighthouse."""
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


def stage2_from(args: argparse.Namespace) -> Stage2 | None:
    """The schedule that parsed arguments ask for; None where Lighthouse stays.

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
    return None if at is None else Stage2(at, 1 if over is None else over)
