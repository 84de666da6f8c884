"""The entry point, where something is not finite: POISON is what, from which iteration on, and on which rank."""

from __future__ import annotations

import os
from typing import Any

import torch

from megatron_lighthouse import cpu

WHAT = ("loss", "gradient", "weight")


def main() -> None:
    cpu.install()
    from megatron.training import get_args
    from megatron.training import training as loop

    from megatron_lighthouse.mcore.loop import finite, pretrain

    what, value, first, rank = os.environ["POISON"].split()
    assert what in WHAT
    clean, step = pretrain.forward_step, loop.train_step

    def poisoned() -> bool:
        return get_args().curr_iteration + 1 >= int(first) and torch.distributed.get_rank() == int(rank)

    def forward_step(data: Any, model: Any) -> Any:
        output, loss_function = clean(data, model)
        if what == "loss" and poisoned() and model.training:
            output = output * float(value)
        elif what == "gradient" and poisoned() and model.training:
            output.register_hook(lambda gradient: gradient * float(value))
        return output, loss_function

    def train_step(forward: Any, data: Any, model: Any, *rest: Any, **named: Any) -> Any:
        answer = step(forward, data, model, *rest, **named)
        if what == "weight" and poisoned():
            [*model[0].parameters()][-1].data.view(-1)[0] = float(value)  # of the output layer: every token meets it
        return answer

    if "POISON_SAVED" in os.environ:  # as in a run that does not check what it saves
        finite.weights_are_finite = lambda model: True

    pretrain.forward_step, loop.train_step = forward_step, train_step
    pretrain.run()


if __name__ == "__main__":
    main()
