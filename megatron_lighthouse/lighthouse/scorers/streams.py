"""The streams of the `dilated` and `gla` scorers: stream c holds the tokens ≡ c mod 4 (paper, δ = 4)."""

from __future__ import annotations

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange

DELTA = 4
"""δ, streams."""


def streams(x: Tensor) -> Tensor:
    """[n, B, H, D] -> [n/δ, δ*B, H, D]: the streams as batch elements. A view where x's first two strides allow it."""
    return x.unflatten(0, (-1, DELTA)).flatten(1, 2)


def tokens(scores: Tensor) -> Tensor:
    """What `streams` does to tokens, undone for scores: [2, δ*B, G, n/δ] -> [2, B, G, n]."""
    return scores.unflatten(1, (DELTA, -1)).permute(0, 2, 3, 4, 1).flatten(3)


def check_streams(scorer: str, rows: int, exchange: Exchange | None) -> None:
    """Raises ValueError unless the `rows` tokens of this rank make whole streams in each of its chunks."""
    size = 1 if exchange is None else exchange.size
    problem = stream_problem(scorer, rows * size, size)
    if problem is not None:
        raise ValueError(problem)


def stream_problem(scorer: str, seq_length: int, size: int) -> str | None:
    """Why `seq_length` tokens on `size` context-parallel ranks do not make whole streams; None where they do."""
    chunks = 1 if size == 1 else 2 * size
    unit = chunks * DELTA
    if seq_length > 0 and seq_length % unit == 0:
        return None
    below = seq_length // unit * unit
    of = "" if size == 1 else f" of each of the {chunks} chunks of {size} context-parallel ranks"
    return (
        f"--seq-length {seq_length} must be a multiple of {unit} for --lighthouse-scorer {scorer}, which takes every "
        f"{DELTA}th token{of}: use --seq-length {f'{below} or ' if below > 0 else ''}{below + unit}."
    )
