"""A progress bar with tokens/s, loss and time left, on the rank where Megatron prints its log."""

from __future__ import annotations

import sys
from typing import Any

import torch
from megatron.training import get_args
from megatron.training import training as megatron_training
from tqdm import tqdm


class Progress:
    """Follows Megatron's `training_log`, which every rank calls once an iteration."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.seconds_between = 0.2 if sys.stderr.isatty() else 10.0

    def update(self, losses: dict[str, Any], iteration: int) -> None:
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        args = get_args()
        if self.bar is None:
            title = f"{getattr(args, 'attention', 'dense')} {args.seq_length} tokens"
            self.bar = tqdm(
                total=args.train_iters,
                initial=iteration - 1,
                desc=title,
                unit="it",
                mininterval=self.seconds_between,
                dynamic_ncols=True,
            )
        # tqdm answers True when it redrew: only then is the loss read, for that waits for the GPU
        if self.bar.update(iteration - self.bar.n) or iteration == args.train_iters:
            rate = self.bar.format_dict["rate"] or 0.0
            loss = losses.get("lm loss")
            shown = {"tokens/s": f"{rate * args.global_batch_size * args.seq_length:,.0f}"}
            if loss is not None:
                shown["loss"] = f"{float(loss):.3f}"
            self.bar.set_postfix(shown)
        if iteration >= args.train_iters:
            self.bar.close()


def install() -> None:
    """Show progress in this process's training loop."""
    progress, log = Progress(), megatron_training.training_log

    def training_log(losses: dict[str, Any], total: Any, rate: Any, iteration: int, *rest: Any, **kwargs: Any) -> Any:
        answer = log(losses, total, rate, iteration, *rest, **kwargs)
        progress.update(losses, iteration)
        return answer

    megatron_training.training_log = training_log
