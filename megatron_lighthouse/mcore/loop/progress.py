"""A progress bar with tokens/s, loss and time left, on the rank where Megatron prints its log."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args

from megatron_lighthouse.bars import SECONDS, bar
from megatron_lighthouse.mcore.command_line.stage import schedule_from
from megatron_lighthouse.mcore.loop.forward_step import ROW_TOKENS
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.variants import VARIANTS, base_in


class Progress:
    """Follows Megatron's `training_log`, which every rank calls once an iteration."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.drawn = 0.0
        self.tokens: float | torch.Tensor = 0
        """Real ones since the bar was last drawn; how many sequences an iteration has may change."""
        self.terminal = sys.stderr.isatty()
        default = 0.2 if self.terminal else SECONDS
        self.seconds_between = float(os.environ.get("LIGHTHOUSE_PROGRESS_SECONDS", default))

    def training_log(
        self, log: Callable[..., Any], losses: dict[str, Any], total: Any, rate: Any, iteration: int, *rest: Any, **named: Any
    ) -> Any:
        """Around Megatron's."""
        self.clear()
        answer = log(losses, total, rate, iteration, *rest, **named)
        self.update(losses, iteration)
        return answer

    def clear(self) -> None:
        """Make room for a line of Megatron's log."""
        if self.bar is not None and self.terminal:
            self.bar.clear()

    def update(self, losses: dict[str, Any], iteration: int) -> None:
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        args = get_args()
        what = f"{attention_in(args, iteration)} {args.seq_length} tokens"
        if self.bar is None:
            self.bar = bar(
                total=last_iteration(iteration, args.train_iters, args.exit_interval),
                initial=iteration,  # when this one began is not known
                desc=what,
                unit="it",
                mininterval=0,
                miniters=1,
            )
            self.drawn = time.monotonic()
        else:
            self.tokens += get_current_global_batch_size() * losses.get(ROW_TOKENS, args.seq_length)
        steps, seconds = iteration - self.bar.n, time.monotonic() - self.drawn
        last = iteration >= self.bar.total
        if seconds >= self.seconds_between or last:  # only then is the loss read, for that waits for the GPU
            tokens = float(self.tokens)
            shown = {"tokens/s": f"{tokens / seconds:,.0f}"} if tokens else {}
            if "lm loss" in losses:
                shown["loss"] = f"{float(losses['lm loss']):.3f}"
            self.bar.set_description(what, refresh=False)
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(steps)
            self.drawn, self.tokens = self.drawn + seconds, 0
        if last:
            self.bar.close()


def train(inner: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Around Megatron's, which says nothing where the checkpoint is of the last iteration, or of a later one."""
    args = get_args()
    if args.iteration >= args.train_iters:
        say_once(
            f"nothing is left to train: the checkpoint is of iteration {args.iteration}, and --train-iters {args.train_iters} "
            "ends there or before. To go on, give more."
        )
    return inner(*given, **named)


def attention_in(args: argparse.Namespace, iteration: int) -> str:
    """--attention, but where the schedule makes all layers what they select for."""
    schedule, base = schedule_from(args) if VARIANTS[args.attention].switches else None, base_in(args)
    return base.name if base and schedule and schedule.all_dense(iteration) else str(args.attention)


def last_iteration(iteration: int, train_iters: int, exit_interval: int | None) -> int:
    """Where a run that is now in `iteration` (1-based) ends: Megatron stops at multiples of --exit-interval."""
    return min(train_iters, -(-iteration // exit_interval) * exit_interval) if exit_interval else train_iters
