"""Multi-token prediction over packed documents: layers that predict further tokens see and predict none of another document.

Megatron's own roll of packed rows reads boundaries on the host, document by document, takes the rows as one, and lets the last
token but one predict the next document's first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.mcore.attention.copied import copied
from megatron_lighthouse.mcore.attention.layer_specs import dense, take_documents
from megatron_lighthouse.mcore.attention.norm import take_torch_norms
from megatron_lighthouse.mcore.attention.packed import PackedDocuments
from megatron_lighthouse.mcore.command_line.documents import asked
from megatron_lighthouse.mcore.global_args import global_args
from megatron_lighthouse.sequence.documents import Documents


def block_spec(inner: Callable[..., Any], config: Any, *args: Any, **named: Any) -> Any:
    """In place of `mtp_block_spec`, which makes these layers' specs anew: with attention that takes documents and latents, what
    tensor-parallel ranks get wrong made right, and norms that take sequence parallelism."""
    spec, given = inner(config, *args, **named), global_args()
    packs = given is not None and asked(given)
    if spec is None:
        return spec
    spec = copied(spec)
    for layer in (x.submodules for x in spec.layer_specs):
        if config.transformer.sequence_parallel:
            take_torch_norms(layer)
            take_torch_norms(layer.mtp_model_layer.submodules)
        if packs:
            take_documents(layer.mtp_model_layer)
        layer.mtp_model_layer = dense(layer.mtp_model_layer, config.transformer)
    return spec


def ends_of(documents: Documents, tokens: Tensor, end: int) -> Tensor:
    """Whose labels are of another document: [b, s] bool. A row's last token is, where it is `end`, a document's last.

    Args:
        documents: of all rows, one row after the other.
        tokens: [b, s].
    """
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    ends.view(-1)[documents.cu_seqlens[1:].long() - 1] = True
    ends[:, -1] = False
    return ends | (tokens == end)


def roll(
    inner: Callable[..., Any],
    tensor: Tensor | None,
    shifts: int = -1,
    dims: int = -1,
    cp_group: Any = None,
    packed_seq_params: Any = None,
) -> tuple[Tensor | None, Tensor | None]:
    """In place of `roll_tensor`: [b, s] -> what the next token has, and the sum of it. 0 where that is of another document.

    What a document's last token has is not handed on either: its label is another document's, and all that its own id would
    help to predict.
    """
    ends = getattr(packed_seq_params, "ends", None)
    if tensor is None or not isinstance(packed_seq_params, PackedDocuments):
        rolled: tuple[Tensor | None, Tensor | None] = inner(tensor, shifts, dims, cp_group, packed_seq_params)
        return rolled
    assert ends is not None
    assert (shifts, dims) == (-1, -1)
    kept = tensor.masked_fill(ends, 0)
    moved = torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], dim=1).masked_fill(ends, 0)
    return moved, moved.sum()
