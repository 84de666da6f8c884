"""Packed documents on their way through Megatron's layers, in the argument that these have for packed rows.

Megatron makes one row of a micro-batch's and calls that 'thd', in which pipelines, experts and RoPE go by rules of their own.
Here the rows stay a batch, [s/cp, b, …] in document zigzag (`sequence.documents`), and only core attention and RoPE know of
documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_lighthouse.sequence.documents import Documents


@dataclass
class PackedDocuments(PackedSeqParams):  # type: ignore[misc]
    """Megatron's parameters of packed rows, of rows that stay a batch."""

    documents: Documents | None = None
    """Of all rows of the micro-batch, one row after the other."""
    ends: Tensor | None = None
    """[b, s] bool, where further tokens are predicted: whose labels are of another document."""
    positions: Tensor | None = None
    """[b, s/cp] int64, of this rank's tokens in their documents; where layers rotate by themselves."""


def packed(
    documents: Documents, seq_length: int, ends: Tensor | None = None, positions: Tensor | None = None
) -> PackedDocuments:
    """What a forward step gives the model.

    Args:
        seq_length: s, positions that RoPE is to know.
        ends, positions: see `PackedDocuments`.
    """
    bounds = documents.cu_seqlens
    lengths = {"max_seqlen_q": seq_length, "max_seqlen_kv": seq_length}
    given: dict[str, Any] = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, **lengths}
    return PackedDocuments(qkv_format="sbhd", documents=documents, ends=ends, positions=positions, **given)


def documents_of(params: Any, tokens: int) -> Documents:
    """The documents of a call's `packed_seq_params`, ours or Megatron's own 'thd', whose boundaries the host reads once.

    Raises:
        ValueError: boundaries that are not those of so many tokens.
    """
    found: Documents | None = getattr(params, "documents", None)
    if found is None:
        bounds = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
        found = params.documents = Documents.of(bounds, tokens)
    if found.tokens != tokens:
        raise ValueError(f"cu_seqlens ends at {found.tokens} tokens, and this layer is given {tokens}.")
    return found


def in_one_row(x: Tensor, ranks: int) -> Tensor:
    """[s/cp, b, …] -> [b·s/cp, 1, …]: first the early chunks of all rows, then the late ones; of one rank, row after row."""
    return x if x.shape[1] == 1 else x.unflatten(0, (_chunks(ranks), -1)).transpose(1, 2).flatten(0, 2).unsqueeze(1)


def in_rows(x: Tensor, rows: int, ranks: int) -> Tensor:
    """[b·s/cp, 1, …] -> [s/cp, b, …]: the way back."""
    return x if rows == 1 else x.squeeze(1).unflatten(0, (_chunks(ranks), rows, -1)).transpose(1, 2).flatten(0, 1)


def _chunks(ranks: int) -> int:
    """That a rank holds of a row."""
    return 2 if ranks > 1 else 1


def attend_documents(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Any,
    ranks: int,
    sinks: Tensor | None = None,
) -> Tensor:
    """Megatron's core-attention contract for documents, by an `AttendDocuments` over one row.

    Args:
        query, key, value: [s/cp, b, heads, hn], or [t, heads, hn] where Megatron has made it 'thd'.
        sinks: [np/tp], where the attention takes them.

    Returns:
        [s/cp, b, np * hn], or [t, np * hn].
    """
    if query.dim() == 3:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        return attend_documents(attend, query, key, value, params, ranks, sinks).squeeze(1)
    rows = query.shape[1]
    documents = documents_of(params, query.shape[0] * rows * ranks)
    own = () if sinks is None else (sinks,)
    return in_rows(attend(*(in_one_row(x, ranks) for x in (query, key, value)), documents, *own), rows, ranks).flatten(2)


class ThdMixin:
    """Has a core attention that takes 'thd' (Transformer Engine's) attend to documents in rows that stay a batch."""

    hidden_size_per_attention_head_v: int
    """Transformer Engine's, to which it holds its values."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any, **named: Any) -> Tensor:
        """Megatron's core-attention contract."""
        base: Callable[..., Tensor] = super().forward  # type: ignore[misc]
        params = named.pop("packed_seq_params", None)
        if not isinstance(params, PackedDocuments):
            return base(query, key, value, mask, *rest, packed_seq_params=params, **named)

        def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
            width, heads = value.shape[-1], query.shape[2]
            wide = max(width, query.shape[-1])
            rows = (query, key, torch.nn.functional.pad(value, (0, wide - width)))
            with self._taking_values_of(wide) if wide > width else nullcontext():
                out = base(*(x.squeeze(1) for x in rows), None, *rest, packed_seq_params=_thd(documents), **named)
            return out.unflatten(-1, (heads, wide))[..., :width].unsqueeze(1)

        return attend_documents(attend, query, key, value, params, 1)

    @contextmanager
    def _taking_values_of(self, wide: int) -> Iterator[None]:
        """Of 'thd' Transformer Engine has kernels for values as wide as keys: MLA's get further channels, as in Megatron."""
        made = self.hidden_size_per_attention_head_v
        self.hidden_size_per_attention_head_v = wide
        try:
            yield
        finally:
            self.hidden_size_per_attention_head_v = made


def _thd(documents: Documents) -> PackedSeqParams:
    lengths = {"max_seqlen_q": documents.longest, "max_seqlen_kv": documents.longest}
    bounds = {"cu_seqlens_q": documents.cu_seqlens, "cu_seqlens_kv": documents.cu_seqlens}
    return PackedSeqParams(qkv_format="thd", **bounds, **lengths)


@cache
def class_over_thd(base: type) -> type:
    """The core-attention class `base`, which takes 'thd', for documents in rows."""
    return type("Documents" + base.__name__, (ThdMixin, base), {"__module__": base.__module__})


def check_call(what: str, mask_type: AttnMaskType, bias: Tensor | None, params: Any, ranks: int) -> None:
    """Raises ValueError for a call that is not causal self-attention, or of packed rows that ranks cut otherwise than ours."""
    if mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal) or bias is not None:
        raise ValueError(f"{what} is causal self-attention: no attention_bias, and not the mask type {mask_type}.")
    if problem := cut_problem(params, ranks):
        raise ValueError(problem)


def cut_problem(params: Any, ranks: int) -> str | None:
    """Why so many ranks cannot attend to packed rows that are not ours; None where they can."""
    if params is None or ranks == 1 or isinstance(params, PackedDocuments):
        return None
    return (
        "upstream's pretrain_gpt.py cuts packed rows for --context-parallel-size as one sequence, and rotates them as "
        "documents: use python -m megatron_lighthouse.pretrain_gpt, or --context-parallel-size 1."
    )
