"""Gated linear attention, which the gla scorer scores by: by flash-linear-attention, or in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.reference import group_norms, window_maxima
from megatron_lighthouse.lighthouse.scorers import gla
from megatron_lighthouse.lighthouse.scorers.both_ways import group_mean
from megatron_lighthouse.lighthouse.scorers.streams import DELTA, streams, tokens
from megatron_lighthouse.lighthouse.steps import Steps
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sums import accumulation_dtype
from megatron_lighthouse.versions import too_old

Linear = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""As `plain`."""


@profiled("gla")
def scores(query: Tensor, key: Tensor, value: Tensor, pyramid: Pyramid, steps: Steps, exchange: Exchange | None) -> Tensor:
    """What `Scorer.__call__` gives."""
    linear = linear_attention(steps, query.device)
    mean = group_mean(query, key.shape[2])
    heads = query.unflatten(2, (key.shape[2], -1)).unbind(3)
    gate = _gate(mean)
    by_query = _norms(heads, key, value, gate, linear, exchange)
    by_key = _norms([key], mean, value, gate, linear, exchange)
    return window_maxima(tokens(torch.stack([by_query, by_key])), pyramid)


def _norms(
    queries: Sequence[Tensor], key: Tensor, value: Tensor, gate: Tensor, linear: Linear, exchange: Exchange | None
) -> Tensor:
    """[δ*B, G, n/δ]: the norms of the streams' rows, those of all `queries` [n, B, G, D] taken as one vector."""
    chunks = 1 if exchange is None else 2
    k, v, g = (_cut(x, chunks) for x in (key, value, gate))
    batch = (-1, DELTA * key.shape[1])
    states, decay = linear(k, k, v, g, None)[1], g.double().sum(1).to(g.dtype)  # states are the same whatever the queries
    states = _starts(states.unflatten(0, batch), decay.unflatten(0, batch), exchange).flatten(0, 1)
    squares = []
    for query in queries:
        rows = linear(_cut(query, chunks), k, v, g, states)[0]
        squares.append(rows.to(accumulation_dtype(rows)).square().sum(-1))
    # [R, chunks, segments, δ*B, T, G] -> [δ*B, G, R, chunks, positions], less the positions that fill up the last segment
    joined = torch.stack(squares).unflatten(1, batch).unflatten(1, (chunks, -1)).permute(3, 5, 0, 1, 2, 4).flatten(4)
    return group_norms(joined[..., : key.shape[0] // chunks // DELTA].flatten(3))


def _cut(x: Tensor, chunks: int) -> Tensor:
    """The streams of x [n, B, G, ...], cut into segments: [segments * δ*B, T, G, ...], zero behind the end of a chunk.

    There zero keys, and gates that forget nothing, leave states as they are.
    """
    x = streams(x).unflatten(0, (chunks, -1))
    length = min(gla.SEGMENT, x.shape[1])
    x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % length))
    return x.unflatten(1, (-1, length)).flatten(0, 1).transpose(1, 2).flatten(0, 1)


def _starts(states: Tensor, gates: Tensor, exchange: Exchange | None) -> Tensor:
    """The states [segments, δ*B, G, D, D] that this rank's segments start from.

    Args:
        states: those that its segments end with when they start from zero.
        gates: [segments, δ*B, G], the sum of the gates of each.
    """
    if exchange is not None:
        states, gates = (exchange.whole(x, "scorer") for x in (states, gates))
    starts = [torch.zeros_like(states[0])]
    for state, gate in zip(states[:-1], gates[:-1], strict=True):
        starts.append(gate.exp()[..., None, None] * starts[-1] + state)
    return torch.stack(starts) if exchange is None else exchange.own(torch.stack(starts))


def plain(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Simple gated linear attention, in fp32 (fp64 for fp64).

    Args:
        query, key, value: [b, T, G, D].
        gate: [b, T, G], g.
        state: [b, G, D, D], S_0; zero by default.

    Returns:
        The rows [b, T, G, D], and S_T.
    """
    kind, rows = accumulation_dtype(query), []
    for parts in zip(*(x.to(kind).transpose(1, 2).split(gla.BLOCK, 2) for x in (query, key, value, gate)), strict=True):
        q, k, v, g = parts
        total = g.cumsum(-1).unsqueeze(-1)
        kept = (total - total.mT).masked_fill(torch.ones_like(g[0, 0].diag_embed()).triu(1).bool(), -torch.inf).exp()
        out, last = (q @ k.mT * kept) @ v, total[:, :, -1:]
        added = ((last - total).exp() * k).mT @ v
        if state is not None:
            out = out + total.exp() * q @ state
            added = added + last.exp() * state
        rows.append(out / q.shape[-1] ** 0.5)
        state = added
    assert state is not None
    return torch.cat(rows, 2).transpose(1, 2), state


def linear_attention(steps: Steps, device: torch.device) -> Linear:
    """What runs the streams beside these steps.

    Raises:
        ValueError: flash-linear-attention is missing on a GPU, or too old.
    """
    return plain if steps is reference or device.type != "cuda" else _flash_linear_attention()


def _flash_linear_attention() -> Linear:
    try:
        chunk_simple_gla = import_module("fla.ops.simple_gla").chunk_simple_gla
    except ImportError as error:
        raise ValueError(
            f"config.scorer gla runs on a GPU by flash-linear-attention, which cannot be imported ({error}): "
            "pip install 'flash-linear-attention>=0.6.0', or use config.scorer norm, summary or dilated."
        ) from error
    if problem := too_old("flash-linear-attention"):
        raise ValueError(
            f"config.scorer gla runs on a GPU by flash-linear-attention, which {problem}, or use "
            "config.scorer norm, summary or dilated."
        )

    def linear(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = query.shape[-1] ** -0.5
        return chunk_simple_gla(query, key, value, gate, scale=scale, initial_state=state, output_final_state=True)

    return linear


def _gate(x: Tensor) -> Tensor:
    """g [n, B, G] of the rows x [n, B, G, D], fp32 (fp64 for fp64); by way of fp64, so that no order of a sum shows."""
    weight = _weight(x.shape[-1], x.device)
    logits = torch.stack([x[:, :, g].double() @ weight for g in range(x.shape[2])], -1)
    return (torch.nn.functional.logsigmoid(logits) / 16).to(accumulation_dtype(x))


@cache
def _weight(dim: int, device: torch.device) -> Tensor:
    """w [D], fp64: truncated normal, standard deviation 0.02 (paper); the same for all heads, layers and ranks (ours)."""
    weight = torch.zeros(dim, dtype=torch.float64)
    torch.nn.init.trunc_normal_(weight, std=0.02, generator=torch.Generator().manual_seed(gla.SEED))
    return weight.to(device)
