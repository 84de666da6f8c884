"""The vectors that the authors' own kernels produced: indices in order, output, gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, Rotary, lighthouse_attention, lighthouse_select
from tests.tolerances import assert_close

TILE_BUDGET = 128  # the authors' kernels know no other; of all divisors of k only this reproduces the indices


@pytest.fixture(params=["case_a", "case_c", "case_d", "case_rope_a", "case_rope_b"])
def case(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parent / "golden" / f"{request.param}.npz"))


def config_of(case: dict[str, np.ndarray]) -> LighthouseConfig:
    _, levels, pooling, budget, _, _ = map(int, case["cfg"])
    return LighthouseConfig(
        levels=levels, pooling=pooling, budget=budget, tile_budget=min(TILE_BUDGET, budget), pin_first=False
    )


def tensor(case: dict[str, np.ndarray], name: str) -> Tensor:
    """[N, H, D] as one batch element, [N, 1, H, D]."""
    return torch.from_numpy(case[name]).unsqueeze(1)


def rotated(x: Tensor, rotary: Rotary | None) -> Tensor:
    """What core attention gets for raw x [N, 1, H, D]: neighbouring channels turned by the position, as complex numbers."""
    if rotary is None:
        return x
    angles = torch.arange(x.shape[0], dtype=torch.float64).outer(rotary.inv_freq).view(x.shape[0], 1, 1, -1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotary_of(case: dict[str, np.ndarray]) -> Rotary | None:
    """The authors rotate the cases that name a base, in Megatron's interleaved form."""
    if "theta" not in case:
        return None
    dim = case["q"].shape[-1]
    return Rotary(float(case["theta"]) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), interleaved=True)


def test_same_entries_in_the_same_order(case: dict[str, np.ndarray]) -> None:
    indices = lighthouse_select(tensor(case, "q"), tensor(case, "k"), config_of(case))  # norms do not see rotation
    np.testing.assert_array_equal(indices[0].numpy(), case["indices"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_output_and_gradients(case: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    inputs = [tensor(case, name).to(dtype).requires_grad_() for name in ("q", "k", "v")]
    rotary = rotary_of(case)
    given = [*(rotated(x, rotary) for x in inputs[:2]), inputs[2]]
    out = lighthouse_attention(*given, config_of(case), rotary=rotary)
    grads = torch.autograd.grad(out, inputs, tensor(case, "dout").to(dtype))
    for name, actual in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        expected = tensor(case, name)
        unit = 1 if rotary is None else expected.abs().max()  # rotated in fp32 there: see the tolerance
        assert_close(actual / unit, expected / unit, "golden")
