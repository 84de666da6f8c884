"""Conversations (`--sft`): rows of several of them, each a document; with what they do not go together. Imports no Megatron."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

FLAG, TOKENIZER = "--sft", "SFTTokenizer"
UNREAD = {
    "eod_mask_loss": "which tokens count is said by the prompt format",
    "reset_position_ids": "positions begin anew in each conversation",
    "text_data": "rows are conversations of JSON lines (--data-path FILE.jsonl)",
    "mock_data": "rows are conversations of JSON lines (--data-path FILE.jsonl)",
    "dataloader_inter_document_masking": "conversations are kept apart without it",
    "mtp_num_layers": "further tokens of conversations are not done",
    "full_validation": "it goes by the lengths of indexed datasets",
}
"""Options of pre-training that do not go with it, by their names, and why."""


def asked(args: Namespace) -> bool:
    """Whether rows hold conversations; of --sft Megatron is not to know while it validates (`loop.validation`)."""
    return bool(getattr(args, "sft", False) or getattr(args, "validates_conversations", False))


def problems(args: Namespace) -> Iterator[str]:
    """What does not go with them, each with what would work."""
    if not asked(args):
        return
    if args.tokenizer_type != TOKENIZER:
        yield f"{FLAG} with --tokenizer-type {args.tokenizer_type}: use {TOKENIZER}, with --tokenizer-model FOLDER."
    for name, why in UNREAD.items():
        if getattr(args, name, None):
            yield f"{FLAG} with --{name.replace('_', '-')}: {why}: leave the latter out."
