"""Multi-latent attention over packed documents: it rotates by itself, in each layer, so each layer picks its tokens' angles.

The angles come with the call and not from the model, since a layer that is computed again meets later micro-batches between.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_lighthouse.mcore.attention.document_rotary import rotate_by
from megatron_lighthouse.mcore.attention.packed import PackedDocuments


class LatentMixin:
    """Has a multi-latent attention rotate the tokens of each document from its first one."""

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        **named: Any,
    ) -> Any:
        """As Megatron's: queries, keys [s/cp, b, np/tp, ·] and values, of rows that stay a batch."""
        if isinstance(packed_seq_params, PackedDocuments):
            assert packed_seq_params.positions is not None
            rotate_by(self, packed_seq_params.positions)
            packed_seq_params = None  # with which Megatron would drop the batch's dimension
        inner = super().get_query_key_value_tensors  # type: ignore[misc]
        return inner(hidden_states, key_value_states, position_ids, packed_seq_params, **named)


def latent_of_documents(attention: ModuleSpec) -> ModuleSpec:
    """`attention` of a layer spec; where it is multi-latent, one that rotates by document."""
    module: Any = attention.module
    found = isinstance(module, type) and issubclass(module, MLASelfAttention) and not issubclass(module, LatentMixin)
    return replace(attention, module=_class_over(module)) if found else attention


@cache
def _class_over(base: type) -> type:
    return type("Documents" + base.__name__, (LatentMixin, base), {"__module__": base.__module__})
