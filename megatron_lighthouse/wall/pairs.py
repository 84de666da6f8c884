"""Softmax attention over decayed rows, written out: [..., n, K] queries, [..., m, K] keys, [..., m, V] values.

What `softmax.blocks` does, with logits that are also biased by query and key (the scalar gate) and hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits_of(query: Tensor, key: Tensor, scale: float, bias: tuple[Tensor, Tensor] | None, hidden: Tensor | None) -> Tensor:
    """[..., n, m] = scale q·k + the bias of a query [..., n] and that of a key [..., m]; -inf where hidden [n, m]."""
    logits = query @ key.transpose(-1, -2) * scale
    if bias is not None:
        logits += bias[0].unsqueeze(-1)
        logits += bias[1].unsqueeze(-2)
    return logits if hidden is None else logits.masked_fill_(hidden, -torch.inf)


def attend(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n, V] and the log-sum-exp [..., n]; 0 and -inf for what sees nothing."""
    lse = logits.logsumexp(-1)
    return (logits - lse.masked_fill(lse.isinf(), 0).unsqueeze(-1)).exp() @ value, lse


def change_of(logits: Tensor, lse: Tensor, grad: Tensor, delta: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """p and ds = p (dO·v - δ), [..., n, m], with lse and δ = dO·o [..., n] of the whole rows."""
    weights = (logits - lse.unsqueeze(-1)).exp()
    return weights, weights * (grad @ value.transpose(-1, -2) - delta.unsqueeze(-1))
