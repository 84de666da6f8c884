"""The softmax's scale: scorers that attend take that of the layer, and 1/sqrt(D) gives the bits that it always gave."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lighthouse import LighthouseConfig, lighthouse_attention, lighthouse_select
from megatron_lighthouse.kernels.lighthouse.attended import blocks_of, constants_of
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.attention import attended_rows, packed_rows
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.softmax.base import scaled
from megatron_lighthouse.variant import Place
from tests.oracle import Problem
from tests.scorer_oracle import oracle
from tests.steps import DEVICE, tensors

SCALE = 1.7
PROBLEM = Problem(96, 3, 2, 8, 4, groups=2, queries_per_group=2, dim=8)
BY_SCALE = [name for name, scorer in SCORERS.items() if scorer.by_scale]


@pytest.mark.parametrize("scorer", BY_SCALE)
def test_a_layer_selects_by_the_scale_that_it_attends_with(scorer: str) -> None:
    inputs, config = tensors(PROBLEM), LighthouseConfig(**PROBLEM.options, scorer=scorer)
    scores = oracle(scorer, *(x.cpu().numpy() for x in inputs), PROBLEM, SCALE)
    expected = reference.select(torch.from_numpy(scores), config.geometry(96), config.pin_first).indices.to(DEVICE)
    select = partial(lighthouse_select, *inputs[:2], config, value=inputs[2])
    assert torch.equal(select(softmax_scale=SCALE), expected)
    assert not torch.equal(select(), expected)
    assert torch.equal(attended_rows(*inputs, config, Place(scale=SCALE)).selection.indices, expected)


@pytest.mark.parametrize("scorer", BY_SCALE)
def test_so_do_documents(scorer: str) -> None:
    inputs = tensors(PROBLEM)
    config = LighthouseConfig(3, 2, 4, 4, scorer=scorer, document_tile=32, whole_below=0)
    cu_seqlens = torch.tensor([0, 50, 96], dtype=torch.int32, device=DEVICE)
    select = partial(lighthouse_select, *inputs[:2], config, value=inputs[2], cu_seqlens=cu_seqlens)
    chosen = select(softmax_scale=SCALE)
    assert not torch.equal(chosen, select())
    found = packed_rows(*inputs, config, cu_seqlens, Place(scale=SCALE)).selection
    assert found is not None
    assert torch.equal(found.indices, chosen)


def test_another_inner_attention_may_have_its_scale_told_to_scorers_that_attend() -> None:
    inputs, given = tensors(PROBLEM), {"attend": lambda q, k, v: q, "softmax_scale": SCALE}
    for scorer in SCORERS:
        config, how = LighthouseConfig(**PROBLEM.options, scorer=scorer), dict[str, Any](given)
        if scorer in BY_SCALE:
            selection = attended_rows(*inputs, config, Place(scale=SCALE)).selection
            found = lighthouse_attention(*inputs, config, **how)
            assert torch.equal(found, lighthouse_attention(*inputs, config, attend=how["attend"], selection=selection))
        else:
            with pytest.raises(ValueError, match="softmax_scale belongs to the default inner attention"):
                lighthouse_attention(*inputs, config, **how)


def test_the_scale_that_d_gives_has_the_bits_of_before() -> None:
    """Kernels had log2(e) / sqrt(D) in fp32, and PyTorch divided by sqrt(D)."""
    products = torch.randn(64, generator=torch.Generator().manual_seed(1))
    for dim in range(1, 513):
        given = constants_of(dim, 1 / dim**0.5, blocks_of(dim, 2))["SCALE"]
        assert np.float32(given) == np.float32(1.4426950408889634 / dim**0.5), dim
        for scale in (None, 1 / dim**0.5):
            found = scaled(products, torch.empty(1, dim), scale)
            assert torch.equal(found, products / dim**0.5), dim
