"""A causal selection on several ranks: that of one, and so no output of theirs rests on a later token either."""

from __future__ import annotations

import pytest
import torch

from megatron_lighthouse import LighthouseConfig
from tests.context_parallel.shards import inputs_of, layer, together
from tests.context_parallel.test_attention import BY_ALL, PROBLEMS, grouped
from tests.ranks import SIZES
from tests.tolerances import assert_close

COMBINED = [*((size, name, "norm") for size in SIZES for name in BY_ALL), *((2, name, "summary") for name in BY_ALL)]


@pytest.mark.parametrize(("size", "name", "scorer"), COMBINED)
def test_ranks_equal_one(size: int, name: str, scorer: str) -> None:
    """Of tiles in chunks, and of tiles that span them, whose rows are dealt."""
    problem = grouped(PROBLEMS[name], "p2p", size)
    inputs, config = inputs_of(problem), LighthouseConfig(**problem.options, scorer=scorer, causal_selection=True)
    *actual, entries = together(size, layer, inputs, config)
    *expected, expected_entries = layer(None, inputs, config)
    assert torch.equal(entries, expected_entries)
    assert not torch.equal(entries, layer(None, inputs, config.replace(causal_selection=False))[-1])
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, "ranks float64")


def test_the_kernels_on_ranks_equal_those_on_one() -> None:
    """With a halo and rows that travel while they run."""
    problem = PROBLEMS["tiles that begin within chunks"]
    inputs = inputs_of(problem, "float32")
    config = LighthouseConfig(**problem.options, causal_selection=True, steps="kernels")
    *actual, entries = together(2, layer, inputs, config)
    *expected, expected_entries = layer(None, inputs, config)
    assert torch.equal(entries, expected_entries)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, "ranks float32")
