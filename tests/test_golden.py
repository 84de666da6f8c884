"""The vectors that the authors' own kernels produced: indices in order, output, gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention, lighthouse_select
from tests.tolerances import assert_close

TILE_BUDGET = 128  # the authors' kernels know no other; of all divisors of k only this reproduces the indices


@pytest.fixture(params=["case_a", "case_c", "case_d"])
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


def test_same_entries_in_the_same_order(case: dict[str, np.ndarray]) -> None:
    indices = lighthouse_select(tensor(case, "q"), tensor(case, "k"), config_of(case))
    np.testing.assert_array_equal(indices[0].numpy(), case["indices"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_output_and_gradients(case: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    inputs = [tensor(case, name).to(dtype).requires_grad_() for name in ("q", "k", "v")]
    out = lighthouse_attention(*inputs, config_of(case))
    grads = torch.autograd.grad(out, inputs, tensor(case, "dout").to(dtype))
    for name, actual in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        assert_close(actual, tensor(case, name), "golden")
