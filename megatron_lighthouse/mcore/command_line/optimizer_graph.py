"""Megatron's --optimizer-cuda-graph: what it does not go with. Imports no Megatron.

The optimizer's step is captured, and repeated with the numbers it had; the learning rate alone is read anew, by the Adam of
Transformer Engine or Apex, which hold it on the GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec

from megatron_lighthouse.mcore.command_line.graphs import flag_named

FLAG = "--optimizer-cuda-graph"
WAITED_FOR = ("fp16", "log_num_zeros_in_grad", "timing_log_level", "optimizer_cpu_offload", "use_precision_aware_optimizer")
"""For what of a step the host waits, or what is not captured with it."""


def problems(args: argparse.Namespace) -> Iterator[str]:
    """What would be repeated as it was, or could not be captured."""
    if not getattr(args, "optimizer_cuda_graph", False):
        return
    if args.optimizer != "adam":
        yield f"{FLAG} is for Adam, and --optimizer is {args.optimizer}: use --optimizer adam, or leave {FLAG} out."
    if (style := args.weight_decay_incr_style) != "constant":
        yield (
            f"{FLAG} with --weight-decay-incr-style {style}: the weight decay would stay what it was: use "
            f"--weight-decay-incr-style constant, or leave {FLAG} out."
        )
    for name in WAITED_FOR:
        if value := getattr(args, name, None):
            yield f"{FLAG} with {flag_named(name)} {value}, which a graph cannot hold: leave one of them out."

    if getattr(args, "save", None) and args.use_distributed_optimizer and not args.no_save_optim:
        yield (
            f"{FLAG} with --use-distributed-optimizer and --save {args.save}: Megatron's checkpoint compares the steps of the "
            f"groups, which are tensors then, and ends: use --no-save-optim, or leave {FLAG} out."
        )


def missing(args: argparse.Namespace) -> bool:
    """Whether it is asked for, and no Adam here holds the learning rate on the GPU."""
    return getattr(args, "optimizer_cuda_graph", False) and not (find_spec("transformer_engine") or find_spec("apex"))
