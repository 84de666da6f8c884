"""The dilated scorer: a token counts as much as attention among every fourth token makes of its query and its key."""

from __future__ import annotations

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.reference import window_maxima
from megatron_lighthouse.lighthouse.scorers.both_ways import attended_both_ways
from megatron_lighthouse.lighthouse.scorers.streams import check_streams, streams, tokens
from megatron_lighthouse.lighthouse.steps import Steps


def dilated(query: Tensor, key: Tensor, value: Tensor, pyramid: Pyramid, steps: Steps, exchange: Exchange | None) -> Tensor:
    """Each stream attends causally to itself, both ways; the norms of the rows are scored (paper, "dilated" scorer).

    Takes time of N²/δ; under context parallelism each rank holds the keys, queries and values of all.

    Raises:
        ValueError: a chunk is not a multiple of δ = 4 tokens.
    """
    check_streams("dilated", query.shape[0], exchange)
    norms = attended_both_ways(streams(query), streams(key), streams(value), steps, exchange)
    return window_maxima(tokens(norms), pyramid)
