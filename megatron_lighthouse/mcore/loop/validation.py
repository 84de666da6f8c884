"""Validation of conversations (`--sft`): the mean over all tokens that count, as everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.training import get_args


def evaluate(inner: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Around Megatron's, which of conversations takes the mean over micro-batches and ranks: another loss in each layout."""
    args = get_args()
    args.validates_conversations, args.sft = args.sft, False
    try:
        return inner(*given, **named)
    finally:
        args.validates_conversations, args.sft = False, args.validates_conversations
