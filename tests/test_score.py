"""Score: norms of the rows, and their maxima over windows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.lighthouse.steps import Steps
from tests.oracle import Problem, norms, problems
from tests.steps import DEVICE, LAYOUTS, both, poisoned, precision, restride, tensors
from tests.tolerances import assert_close

few = settings(derandomize=True, max_examples=15)


def geometry_of(problem: Problem) -> Geometry:
    return LighthouseConfig(**problem.options).geometry(problem.seq_length)


@both
@few
@given(problem=problems(), layout=st.sampled_from(LAYOUTS))
def test_equals_the_maxima_of_norms(steps: Steps, problem: Problem, layout: str) -> None:
    query, key, value = tensors(problem, precision(steps))
    query, key, _ = restride(layout, query, key, value)
    with poisoned():
        scores = steps.score(query, key, geometry_of(problem))
    ratio, expected = problem.queries_per_group, []
    for x, heads in ((query, ratio), (key, 1)):
        for b in range(problem.batch):
            for g in range(problem.groups):
                score = norms(x[:, b, g * heads : (g + 1) * heads].double().cpu().numpy())
                for level in range(1, problem.levels):
                    width = problem.pooling**level
                    expected += [max(score[i : i + width]) for i in range(0, problem.seq_length, width)]
    assert_close(scores.flatten(), torch.tensor(expected, dtype=torch.float64), precision(steps))


SHAPES = {
    "D=128": Problem(96, 3, 2, 8, 4, batch=2, groups=2, queries_per_group=3, dim=128),
    "D=40, p=3": Problem(54, 3, 3, 4, 2, dim=40, queries_per_group=2),
    "D=256": Problem(64, 2, 4, 4, 4, dim=256),
    "D=1": Problem(64, 2, 4, 4, 4, dim=1),
    "windows larger than a block": Problem(1024, 5, 4, 2, 2, dim=128, groups=2),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_and_reference_agree_to_the_bit(shape: str, dtype: str) -> None:
    query, key, _ = tensors(SHAPES[shape], dtype)
    geometry = geometry_of(SHAPES[shape])
    with poisoned():
        scores = kernels.score(query, key, geometry)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, reference.score(query, key, geometry))
    assert torch.equal(scores.cpu(), reference.score(query.cpu(), key.cpu(), geometry))


@both
def test_norms_beyond_the_dtype_do_not_overflow(steps: Steps) -> None:
    x = torch.full((64, 1, 1, 64), 60000, dtype=torch.float16, device=DEVICE)
    scores = steps.score(x, x, geometry_of(Problem(64, 2, 4, 4, 4)))
    assert (scores == 480000).all()


@both
def test_no_gradient(steps: Steps) -> None:
    query, key, _ = (x.requires_grad_() for x in tensors(SHAPES["D=1"], "float32"))
    assert not steps.score(query, key, geometry_of(SHAPES["D=1"])).requires_grad
