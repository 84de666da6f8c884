"""What each part has to do: floating-point operations, and bytes it cannot avoid to move. Counts, no speeds."""

from __future__ import annotations

from megatron_lighthouse.lighthouse.geometry import Geometry, Shape
from megatron_lighthouse.plan.model import GPT

FORWARD_AND_BACKWARD = 3.5
"""Operations of attention forward and backward over those forward: two products, and five more (FlashAttention-2 paper)."""
STEPS = (("score", "fwd"), ("gather", "fwd"), ("scatter", "fwd"), ("gather", "bwd"), ("scatter", "bwd"))
"""The steps that memory bounds, and when they run."""


def attention_flops(rows: float, layer: Shape) -> float:
    """Forward: two causal products of rows^2/2 * D multiply-adds a head, 2 operations each."""
    return 2.0 * rows**2 * layer.batch * layer.heads * layer.dim


def step_bytes(step: str, tokens: int, rows: int, layer: Shape) -> float:
    """Bytes that a step must move, each once, either direction (as benchmarks/attention.py counts its floor)."""
    row = layer.batch * layer.dim * layer.itemsize
    return {
        "score": tokens * (layer.heads + layer.groups) * row,
        "gather": (tokens + rows) * (layer.heads + 2 * layer.groups) * row,
        "scatter": (tokens + rows) * layer.heads * row,
    }[step]


def select_features(geometry: Geometry, layer: Shape, ranks: int, multiprocessors: int) -> list[float]:
    """What select's time is linear in: turns over the tiles; those times levels to refine; those times windows a tile."""
    programs = geometry.tiles * layer.batch * layer.groups / ranks
    turns = max(1.0, programs / multiprocessors)
    windows = geometry.entries(geometry.levels - 1) / geometry.tiles
    return [turns, turns * (geometry.levels - 1), turns * windows]


def elementwise_bytes(model: GPT, rotated: int) -> float:
    """Forward, for a token and layer, bf16: two norms and two residual sums (10h), RoPE, SwiGLU (3 FFN).

    Args:
        rotated: columns that RoPE turns: queries, keys, and further projections.
    """
    return 2.0 * (10 * model.hidden + 2 * rotated + 3 * model.ffn)
