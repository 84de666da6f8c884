"""Causal attention with sinks (gpt-oss): a logit a head, of a key that every row sees and whose value is 0.

    o_i = sum_j e^(s_ij) v_j / (e^sink + sum_j e^(s_ij))

Where a backend gives its log-sum-exp, the sinks enter after it (`Part.with_sinks`). Where not, it attends to one more key row,
at the front, whose value is 0: further channels of the queries hold sink / scale, of that key 1, and of the others 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.alone import Alone
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.softmax.base import scale_of
from megatron_lighthouse.softmax.blocks import block_for
from megatron_lighthouse.softmax.rows import SINKS

AttendWithSinks = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""([S, B, H, D], [S, B, G, D], [S, B, G, D], [H]) -> [S, B, H, D]."""
CHANNELS = 8
"""That are added: kernels want multiples of 8."""


def sinks_attention(
    name: str, query: Tensor, key: Tensor, softmax_scale: float | None = None, value_dim: int | None = None
) -> AttendWithSinks:
    """As `inner_attention`, with sinks, whose gradients are exact too.

    Raises:
        ValueError: as `inner_attention`.
    """
    scale = scale_of(query, softmax_scale)
    if name in key_row_backends(query.shape[-1]):
        q, k = (torch.nn.functional.pad(x[:1], (0, CHANNELS)) for x in (query, key))
        attend = inner_attention(name, q, k, scale)
        return lambda q, k, v, sinks: _with_key_row(attend, q, k, v, sinks / scale)
    scheme = Alone(block_for(name, query, key, scale, value_dim, over=SINKS))
    return lambda q, k, v, sinks: scheme((q,), (k, v), sinks)


def key_row_backends(dim: int) -> tuple[str, ...]:
    """The backends that take sinks as a key row, where they are forced: FlashAttention 2's log-sum-exp needs D % 8 = 0."""
    return ("fa2",) if dim % 8 else ()


def _with_key_row(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, logits: Tensor) -> Tensor:
    """Attention over one more row, at the front. The first channel has a logit, the next ones what rounding took from it."""
    parts, rest = [logits.to(query.dtype)], logits.detach()
    for _ in range(2):
        rest = rest - parts[-1].detach()
        parts.append(rest.to(query.dtype))
    own = torch.stack([*parts, *[torch.zeros_like(parts[0])] * (CHANNELS - len(parts))], -1)
    q = torch.cat([query, own.expand(*query.shape[:2], -1, -1)], -1)
    first = torch.zeros_like(key[:1, ..., :1]).expand(-1, -1, -1, key.shape[-1] + CHANNELS).clone()
    first[..., -CHANNELS : len(parts) - CHANNELS] = 1
    k = torch.cat([first, torch.nn.functional.pad(key, (0, CHANNELS))])
    wider = k.shape[-1] - value.shape[-1]
    q, v = (torch.nn.functional.pad(x, (0, more, 0, 0, 0, 0, 1, 0)) for x, more in ((q, 0), (value, wider)))
    return attend(q, k, v)[1:, ..., : value.shape[-1]]
