"""Values of another width than keys, and heads that share a selection: both implementations, and several ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.attention import lighthouse_select
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.steps import Steps
from tests.context_parallel.shards import Group, shards_of, together
from tests.oracle import Problem
from tests.steps import DEVICE, both, differentiate, entries, poisoned, precision, random_like, selection_of, tensors
from tests.tolerances import assert_close

PROBLEM = Problem(64, 3, 2, 8, 2, batch=2, groups=4, dim=10, seed=4)
SHARED = LighthouseConfig(**PROBLEM.options, heads_per_selection=2)
ROTARY = Rotary(torch.tensor([1.0, 0.3]), first=6)
WIDTH = 6


def narrow(inputs: list[Tensor]) -> list[Tensor]:
    """The same with narrower values."""
    query, key, value = inputs
    return [query, key, value[..., :WIDTH]]


@both
@pytest.mark.parametrize("travels", [False, True], ids=["", "under way"])
def test_gather_of_shared_selections_is_that_of_each_head(steps: Steps, travels: bool) -> None:
    """With the selection written out for each head, and the values by themselves."""
    four, two = replace(PROBLEM, batch=1), replace(PROBLEM, batch=1, groups=2)
    shared = selection_of(two, entries(two))
    each = Selection(shared.geometry, shared.places.repeat_interleave(2, 1), shared.length)
    query, key, value = narrow(tensors(four, precision(steps)))
    query = torch.cat([query, 2 * query], 3).unflatten(3, (2, -1)).flatten(2, 3)  # two queries a key

    def expected(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        rows_q, rows_k, _ = reference.gather(query, key, key, each, None, ROTARY)
        return rows_q, rows_k, reference.gather(value, value, value, each)[2]

    class Travel:
        far: Any = ()

        def set_out(self, far: tuple[Tensor, ...]) -> None:
            self.far = far

        def come_home(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(x + 1 for x in grads)

    travel = Travel() if travels else None
    with poisoned():
        rows = steps.gather(query, key, value, shared, travel, ROTARY)
        grads = random_like(rows)
        found = differentiate(lambda *x: steps.gather(*x, shared, travel, ROTARY), (query, key, value), grads)
    home = [grads[0], *(x + 1 for x in grads[1:])] if travels else grads
    wanted = expected(query, key, value)
    for x, y in zip((*rows, *found), (*wanted, *differentiate(expected, (query, key, value), home)), strict=True):
        assert_close(x, y, precision(steps))
    assert not travels or [x.shape[3] for x in travel.far] == [10, WIDTH]


def test_the_layer_is_that_of_padded_values() -> None:
    """Everything is linear in the channels of values."""
    query, key, value = narrow(tensors(PROBLEM))
    grad = torch.randn(64, 2, 4, WIDTH, dtype=torch.float64, device=DEVICE)

    def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return lighthouse_attention(query, key, torch.nn.functional.pad(value, (0, 4)), SHARED)[..., :WIDTH]

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return lighthouse_attention(query, key, value, SHARED)

    found, wanted = (differentiate(f, (query, key, value), [grad]) for f in (layer, padded))
    for x, y in zip((layer(query, key, value), *found), (padded(query, key, value), *wanted), strict=True):
        assert_close(x, y, "float64")


def test_heads_share_the_selection_of_their_summed_scores() -> None:
    query, key, _ = tensors(PROBLEM)
    geometry = SHARED.geometry(64)
    scores = reference.score(query, key, geometry)
    chosen = lighthouse_select(query, key, SHARED)
    assert chosen.shape == (2, 2, geometry.gathered_length)
    assert torch.equal(chosen, reference.select(scores[:, :, 0::2] + scores[:, :, 1::2], geometry, True).indices)
    assert not torch.equal(chosen, lighthouse_select(query, key, SHARED.replace(heads_per_selection=1))[:, ::2])


def on_rank(group: Group, inputs: list[Tensor], config: LighthouseConfig) -> list[Tensor]:
    query, key, value, grad = shards_of(group, inputs)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = lighthouse_attention(*leaves, config, cp_group=group, rotary=ROTARY)
    entries = lighthouse_select(query, key, config, cp_group=group)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad), entries.movedim(-1, 0)]


@pytest.mark.parametrize("tile_budget", [2, 8], ids=["ranks select alone", "rows are dealt"])
def test_ranks_equal_one(tile_budget: int) -> None:
    config = SHARED.replace(tile_budget=tile_budget)
    inputs = narrow([x.cpu() for x in tensors(PROBLEM)])
    inputs.append(random_like(inputs[2:])[0])
    for x, y in zip(together(2, on_rank, inputs, config), on_rank(None, inputs, config), strict=True):
        assert_close(x, y, "ranks float64")


def test_what_shared_selections_do_not_go_with() -> None:
    query, key, value = tensors(PROBLEM)
    with pytest.raises(ValueError, match=r"config.heads_per_selection 3 must divide the 4 .*: use 2 or 4"):
        lighthouse_attention(query, key, value, SHARED.replace(heads_per_selection=3))
    with pytest.raises(ValueError, match=r"config.heads_per_selection -1 must not be negative"):
        SHARED.replace(heads_per_selection=-1)
    with pytest.raises(ValueError, match=r"config.scorer dilated reads values .* have 6 and 10: use config.scorer norm"):
        lighthouse_attention(query, key, value[..., :WIDTH], SHARED.replace(scorer="dilated"))
    bounds = torch.tensor([0, 64], dtype=torch.int32, device=DEVICE)
    one = [x[:, :1] for x in (query, key, value)]
    with pytest.raises(ValueError, match=r"config.heads_per_selection 2 is not done for packed documents"):
        lighthouse_attention(*one, SHARED, cu_seqlens=bounds)
    around = SHARED.replace(heads_per_selection=1, around="parallax")
    with pytest.raises(ValueError, match=r"with config.around parallax is for values of the D of keys, 10, not 6"):
        lighthouse_attention(*one[:2], one[2][..., :WIDTH], around, streams=[one[0]], cu_seqlens=bounds)
    alone = SHARED.replace(heads_per_selection=1, scorer="dilated")
    with pytest.raises(ValueError, match=r"config.scorer dilated reads values .* have 6 and 10: use config.scorer norm"):
        lighthouse_attention(*one[:2], one[2][..., :WIDTH], alone, cu_seqlens=bounds)
