"""Whether evaluations come between or after iterations that train. Imports no Megatron."""

from __future__ import annotations

import argparse


def of_what_trains(args: argparse.Namespace) -> bool:
    """Whether a run, or a later job of the same command line, evaluates what it has trained, as Megatron-core 0.19 does.

    That is every --eval-interval iterations from --start-eval-at-iter on, and at the end, which a job that ends by
    --exit-interval does not reach.

    Args:
        args: as the words say, not validated.
    """
    if args.skip_train or not (args.eval_iters or args.full_validation):
        return False
    if not (last := args.train_iters):  # counted in samples
        return True
    every, ends = args.eval_interval, args.exit_interval
    within = bool(every) and last // every * every >= max(every, args.start_eval_at_iter or 0)
    return within or not ends or last % ends != 0
