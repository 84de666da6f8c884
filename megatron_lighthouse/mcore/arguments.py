"""The names that checkouts of Megatron-LM hold which `patches/patch.py` has changed."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_lighthouse.mcore.command_line import arguments, documents
from megatron_lighthouse.mcore.command_line.arguments import with_lighthouse_arguments

__all__ = ["use_attention", "with_lighthouse_arguments"]


def use_attention(args: Namespace, model_cfg: Any) -> Any:
    """See `command_line.arguments.use_attention`; in upstream's loop.

    Raises:
        ValueError: likewise, and what that loop does not do.
    """
    if found := [*documents.upstream_problems(args, model_cfg.transformer)]:
        raise ValueError("\n".join(found))
    return arguments.use_attention(args, model_cfg)
