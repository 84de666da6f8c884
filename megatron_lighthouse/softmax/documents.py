"""The inner attention over documents, end to end in one row: plain causal attention within each, by the fastest backend.

The backends are those of `softmax.backends`, by the same names, where they take documents of unequal lengths in one call.
cuDNN's does not: torch hands it whole rows, and documents only without the causal mask (2.15 with it too: not timed).
It is the faster of the two that torch has, so long documents have a call of it each, and those between two of them one of
FlashAttention 2's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad

from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.softmax.backends import (
    BACKENDS,
    FAMILIES,
    Backend,
    choose_for_documents,
    deterministic,
    flash_function,
    flash_problem,
)
from megatron_lighthouse.softmax.base import scale_of
from megatron_lighthouse.softmax.names import FLASH_DIMS
from megatron_lighthouse.softmax.rows import DOCUMENTS, SINKS, WINDOWS, RowKind
from megatron_lighthouse.softmax.windowed_documents import DocumentsAlone, within_documents

LONG = 8 * 4096**2
"""Rows squared, times heads, from which a document has a call of its own: cuDNN's lead over FlashAttention 2 is longer than the
launches of a call then. Ours, by `benchmarks/documents.py` on an H200."""

PLANNED = 512
"""What a long document's rows are filled up to a multiple of: documents come in all lengths, and so in few numbers of rows."""

CHOOSES = Version(torch.__version__).release >= (2, 15)
"""Whether torch's attention over documents would take cuDNN's unasked, which does not repeat to the bit. Asking costs the host
20 µs a call."""

AttendDocuments = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]
"""Causal attention within each document: ([S, 1, H, D], [S, 1, G, D], [S, 1, G, D], documents) -> [S, 1, H, D]."""


def documents_attention(
    name: str,
    query: Tensor,
    key: Tensor,
    softmax_scale: float | None = None,
    *,
    value_dim: int | None = None,
    window: int | None = None,
    sinks: bool = False,
) -> Callable[..., Tensor]:
    """An `AttendDocuments` by the backend `name` for these rows, or by the fastest for 'auto'; said once.

    Args:
        query: [S, 1, H, D]; key: [S, 1, G, D]; of these only heads, D, dtype and device count.
        softmax_scale: 1/sqrt(D) by default.
        value_dim: of the values, where it is not D.
        window: rows before its own that a row sees; None: all.
        sinks: whether every call brings a sink for each head, behind the documents.

    Raises:
        ValueError: a backend that is forced and is not there, or cannot take these rows.
    """
    if window is not None or sinks:
        scale = scale_of(query, softmax_scale)
        return DocumentsAlone(within_documents(name, query, key, scale, value_dim, window, SINKS if sinks else WINDOWS))
    chosen = choose_for_documents(name, RowKind.of(query, key, value_dim))
    attend = FAMILIES[DOCUMENTS][chosen].attend
    return lambda q, k, v, documents: attend(q, k, v, softmax_scale, documents)


def _flash(module: str) -> Callable[..., Tensor]:
    function = flash_function(module, "flash_attn_varlen_func")

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None, documents: Documents) -> Tensor:
        bounds, longest = documents.cu_seqlens, documents.longest
        # by name: FlashAttention 4 has another argument between the tensors and these
        options = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        out = function(q, k, v, softmax_scale=softmax_scale, causal=True, deterministic=deterministic(), **options)
        return out.unsqueeze(1)

    return attend


def _torch_problem(rows: RowKind) -> str | None:
    if problem := BACKENDS["fa2"].problem(rows):
        return problem
    if rows.dim % 8:
        return f"does not take head dimension {rows.dim}"
    return None if {"scale", "window_size"} <= _taken() else f"does not take documents in torch {torch.__version__}"


@cache
def _taken() -> frozenset[str]:
    """The arguments of torch's attention over documents; none where it is not there."""
    try:
        return frozenset(inspect.signature(import_module("torch.nn.attention.varlen").varlen_attn).parameters)
    except ImportError:
        return frozenset()


def _torch(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(1) for x in (query, key, value))
    bounds, longest = documents.cu_seqlens, documents.longest
    options: dict[str, Any] = {"scale": softmax_scale, "window_size": (-1, 0)}
    if "enable_gqa" in _taken():  # torch 2.11 takes fewer key/value heads without being told
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if CHOOSES else nullcontext():
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    assert isinstance(out, Tensor)  # with the log-sum-exp where that is asked for
    return out.unsqueeze(1)


def _long_alone(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None, documents: Documents) -> Tensor:
    """Which documents are long goes by lengths and heads alone: all layers and repeats choose alike."""
    parts = documents.long_alone(math.isqrt((LONG - 1) // query.shape[2]) + 1)
    if len(parts) == 1:  # not cut: autograd would put the pieces' gradients together by a copy
        return _part(BACKENDS["cudnn"].attend, query, key, value, softmax_scale, parts[0])
    sizes = [part.tokens for part in parts]
    cut = zip(query.split(sizes), key.split(sizes), value.split(sizes), parts, strict=True)
    return torch.cat([_part(_padded, q, k, v, softmax_scale, part) for q, k, v, part in cut])


def _part(
    alone: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, part: Documents
) -> Tensor:
    return alone(q, k, v, softmax_scale) if len(part.lengths) == 1 else _torch(q, k, v, softmax_scale, part)


def _padded(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None) -> Tensor:
    """A document with rows of zeros behind it, which no row of its own sees: cuDNN makes a plan for each number of rows."""
    rows = len(query)
    given = (pad(x, (0, 0, 0, 0, 0, 0, 0, -rows % PLANNED)) for x in (query, key, value))
    return BACKENDS["cudnn"].attend(*given, softmax_scale)[:rows]


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None, documents: Documents) -> Tensor:
    attend = BACKENDS["sdpa"].attend
    q, k, v = (x.split(documents.lengths) for x in (query, key, value))
    return torch.cat([attend(*part, softmax_scale) for part in zip(q, k, v, strict=True)])


FAMILIES[DOCUMENTS] = {
    "fa4": Backend(
        "FlashAttention 4",
        flash_problem("flash-attn-4", "flash_attn.cute", FLASH_DIMS["fa4"], "flash_attn_varlen_func"),
        _flash("flash_attn.cute"),
    ),
    "fa3": Backend(
        "FlashAttention 3",
        flash_problem(
            "hopper/ of the flash-attention repository", "flash_attn_interface", FLASH_DIMS["fa3"], "flash_attn_varlen_func"
        ),
        _flash("flash_attn_interface"),
        BACKENDS["fa3"].repeats,
    ),
    "cudnn": Backend(
        f"{BACKENDS['cudnn'].title}, and FlashAttention 2 for short documents together",
        lambda rows: BACKENDS["cudnn"].problem(rows) or _torch_problem(rows),
        _long_alone,
        BACKENDS["cudnn"].repeats,
    ),
    "fa2": Backend(BACKENDS["fa2"].title, _torch_problem, _torch),
    "sdpa": Backend("torch's scaled_dot_product_attention, document by document", lambda rows: None, _one_by_one),
}
