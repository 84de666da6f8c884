"""Megatron's dataset of conversations (`--sft`): the tokens, labels and mask that it gives, with their padding kept apart.

Each conversation of a row is a document. Megatron counts the padding at the row's end to the last one, and under context
parallelism fills each up to a multiple of 2C. Here the padding is a document of its own, of which no token counts, and nothing
else is filled up: so a conversation is as if it were alone, on any number of ranks.
But for its loss: labels are Megatron's, and prompt formats that mask nothing (`default`, `identity`) train its last token to
predict the next conversation's first.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.training.datasets.sft_dataset import SFTDataset
from torch import Tensor

from megatron_lighthouse.mcore.data.conversation_files import Conversations


class ConversationDataset(SFTDataset):  # type: ignore[misc]
    """Rows of conversations. Of its config, `context_parallel_size` must be 1."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> Conversations:
        """Without the package `datasets`, which Megatron's needs."""
        return Conversations(dataset_path)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """As Megatron's: tokens, labels, loss_mask, position_ids [N], and cu_seqlens [N + 1], filled up with N."""
        row: dict[str, Any] = super().__getitem__(idx)
        real = int(real_tokens(row["labels"], self.config.tokenizer.pad).sum())
        row["cu_seqlens"] = padding_apart(row["cu_seqlens"], real)
        return row


def real_tokens(labels: Tensor, pad: int) -> Tensor:
    """[..., N] bool: which tokens of rows are no padding, of the tokens that follow them. An end that is a `pad` is padding."""
    tokens = labels.shape[-1]
    places = torch.arange(tokens, device=labels.device)
    last = torch.where(labels != pad, places, -1).amax(-1, keepdim=True)
    return places <= last + 1


def padding_apart(cu_seqlens: Tensor, real: int) -> Tensor:
    """Boundaries [N + 1] of which the last document ends after the first `real` tokens, where the padding begins."""
    tokens = len(cu_seqlens) - 1
    begins = cu_seqlens[cu_seqlens < tokens]
    real = max(real, int(begins[-1]) + 1)
    return torch.cat([begins, begins.new_tensor([real]), begins.new_full((tokens - len(begins),), tokens)])
