"""The gla scorer: as `dilated`, by linear attention that forgets, in time of N instead of N²."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse import reference
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.geometry import Pyramid
from megatron_lighthouse.ranges import step
from megatron_lighthouse.reference import window_maxima
from megatron_lighthouse.scorers.both_ways import group_mean
from megatron_lighthouse.scorers.streams import check_streams, streams, tokens
from megatron_lighthouse.steps import Steps

SEGMENT = 512
"""Positions of a stream that are worked through at a time. The state at the start of each is added up over the segments before
it, in their order: the same numbers for any number of ranks whose chunks are whole segments (2048 tokens each)."""
BLOCK = 64
"""Positions that plain PyTorch works on at a time."""


@step("gla")
def gla(query: Tensor, key: Tensor, value: Tensor, pyramid: Pyramid, steps: Steps, exchange: Exchange | None) -> Tensor:
    """Each stream runs through simple gated linear attention, both ways; the norms of the rows are scored (paper, "gla").

    o_t = q_t S_t / sqrt(D) with S_t = exp(g_t) S_{t-1} + k_t^T v_t and g_t = logsigmoid(w·x_t) / 16. In the paper x is the input
    of the layer, with one w a head that never receives a gradient. Attention does not see that input: here x is the query, the
    mean of a group's queries, and w one fixed random vector (ours).

    Raises:
        ValueError: a chunk is not a multiple of δ = 4 tokens, or flash-linear-attention is missing on a GPU.
    """
    check_streams("gla", query.shape[0], exchange)
    run = plain if steps is reference or query.device.type != "cuda" else _flash_linear_attention()
    chunks = 1 if exchange is None else 2
    mean = group_mean(query, key.shape[2])
    gate = segments(streams(_gate(mean)), chunks)
    q, k, v, mean = (segments(streams(x), chunks) for x in (query, key, value, mean))
    norms = [_norms(*x, v, gate, run, exchange) for x in ((q, k), (k, mean))]
    length = query.shape[0] // chunks // 4
    scores = torch.stack([x.unflatten(-1, (chunks, -1))[..., :length].flatten(-2) for x in norms])
    return window_maxima(tokens(scores), pyramid)
