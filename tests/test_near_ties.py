"""Runs of one repeated token, whose queries and keys are alike but for rounding: what decides which of them are refined.

By the mathematics all tokens of a run tie, for RoPE turns a row and leaves its length. In fp32 the lengths differ in their last
bits, by the shapes of the products that made them, and so by the layout. In float64, rounded to fp32, they tie on every layout.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.lighthouse import reference
from tests.tolerances import assert_close

N, HIDDEN, HEADS, GROUPS, DIM = 512, 64, 4, 2, 16
CONFIG = LighthouseConfig(budget=16, tile_budget=8)


def runs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states [N, HIDDEN] of runs of 64 to 127 tokens, and the matrix that makes queries and keys of them."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randn(8, HIDDEN, generator=generator, dtype=torch.float64)
    lengths = torch.randint(64, 128, (8,), generator=generator)
    matrix = torch.randn(HIDDEN, (HEADS + GROUPS) * DIM, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    return words.repeat_interleave(lengths, 0)[:N].to(dtype), matrix.to(dtype)


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """Queries and keys [N, (H + G) * D] as one rank, two tensor-parallel and four context-parallel ranks make them."""
    hidden, matrix = runs(dtype)
    return {
        "one": hidden @ matrix,
        "tensor parallel": torch.cat([hidden @ part for part in matrix.chunk(2, 1)], 1),
        "context parallel": torch.cat([part @ matrix for part in hidden.chunk(4)]),
    }


def scores(projected: Tensor) -> Tensor:
    """Of the rows after RoPE (Su et al., 2021), in their own dtype."""
    angles = torch.arange(N).double().outer(10000.0 ** -(torch.arange(DIM // 2).double() / (DIM // 2))).view(N, 1, 1, -1)
    sin, cos = angles.sin().to(projected.dtype), angles.cos().to(projected.dtype)
    a, b = projected.view(N, 1, HEADS + GROUPS, DIM).chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return reference.score(turned[:, :, :HEADS], turned[:, :, HEADS:], CONFIG.geometry(N))


def entries(found: Tensor) -> Tensor:
    return reference.select(found, CONFIG.geometry(N), True).indices


@pytest.mark.parametrize("layout", ["tensor parallel", "context parallel"])
def test_with_float64_norms_every_layout_selects_alike(layout: str) -> None:
    projected = layouts(torch.float64)
    found, expected = (scores(projected[name]).float() for name in (layout, "one"))
    assert torch.equal(found, expected)
    assert torch.equal(entries(found), entries(expected))


@pytest.mark.parametrize("layout", ["tensor parallel", "context parallel"])
def test_in_fp32_norms_differ_by_rounding_alone(layout: str) -> None:
    assert_close(scores(layouts(torch.float32)[layout]), scores(layouts(torch.float64)["one"]), "float32")


def test_float64_lengths_of_a_run_are_one() -> None:
    """Else the first test would hold of a selection without ties."""
    level_1 = scores(layouts(torch.float64)["one"]).float()[..., : N // 4]
    assert len(level_1[0, 0, 0].unique()) <= 8
