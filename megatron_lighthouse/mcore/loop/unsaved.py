"""A resume by a job that saves no optimizer, or no state of its generators, of its own.

Megatron 0.19 asks a sharded checkpoint for what the job would save, not for what it needs: with `--no-save-optim` or
`--no-save-rng` it ends in a KeyError, wherever `--load` has a checkpoint to go on from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.training import get_args

UNSAVED = ("no_save_optim", "no_save_rng")


def load_checkpoint(load: Callable[..., Any], *rest: Any, **named: Any) -> Any:
    """Around Megatron's: while it loads, nothing is left out of what the checkpoint is asked for."""
    args = get_args()
    asked = {name: getattr(args, name) for name in UNSAVED}
    for name in UNSAVED:
        setattr(args, name, None)
    try:
        return load(*rest, **named)
    finally:
        for name, value in asked.items():
            setattr(args, name, value)
