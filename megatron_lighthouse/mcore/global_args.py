"""What Megatron was given, where its training loop runs."""

from __future__ import annotations

from argparse import Namespace


def global_args() -> Namespace | None:
    """Megatron's arguments, or None outside its training loop: a model may be used without one."""
    try:
        from megatron.training import get_args

        return get_args()
    except (ImportError, AssertionError):
        return None
