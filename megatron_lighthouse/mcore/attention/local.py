"""Megatron's local core attention for values of another width than keys, as MLA's: Megatron's own has no arguments for it."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention


class LocalAttention(DotProductAttention):  # type: ignore[misc]
    """`DotProductAttention`, which multiplies by values of any width, and is told of theirs."""

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        """See `DotProductAttention`.

        Args:
            k_channels: of keys, by which MLA has made its softmax scale.
            v_channels: of values; None: as many as the model's heads have.
        """
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
