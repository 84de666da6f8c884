"""Lighthouse over packed documents on several ranks, against one rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention, lighthouse_select
from megatron_lighthouse.context_parallel import exchange
from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.sent import dealt, document_bytes
from megatron_lighthouse.lighthouse.packed.shares import Shares
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.sequence.layout import Layout
from tests.context_parallel.shards import Group
from tests.context_parallel.test_documents import row_of, rows_of_ranks
from tests.packed_oracle import Packed, of, rows
from tests.ranks import SIZES, run_ranks
from tests.steps import random_like, tensors
from tests.tolerances import assert_close

MIXED = (1, 40, 3, 9, 16, 2, 83, 5, 27, 6)
"""Of one token, shorter than 2C, with chunks shorter than a window, and over all ranks; windows of 4 that chunks cut."""
ROWS = {"mixed": MIXED, "one over all ranks": (160,), "whole ones alone": (3, 5) * 8}


def layer(
    group: Group,
    lengths: Sequence[int],
    inputs: Sequence[Tensor],
    config: LighthouseConfig,
    comm_type: str,
    rotary: Rotary | None,
) -> list[Tensor]:
    """Output, gradients, and the entries attended to, of this rank's tokens."""
    documents = row_of(lengths)
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    rows = documents.rows_of_rank(Layout(size, rank))
    leaves = [x[rows].requires_grad_() for x in inputs[:3]]
    how: dict[str, Any] = {"cu_seqlens": documents, "softmax_scale": 0.9, "rotary": rotary, "cp_group": group}
    out = lighthouse_attention(*leaves, config, cp_comm_type=comm_type, **how)
    grads = torch.autograd.grad(out, leaves, inputs[3][rows])
    chosen = lighthouse_select(leaves[0], leaves[1], config, value=leaves[2], **how)
    return [out.detach(), *grads, chosen]


def sent(
    group: dist.ProcessGroup, lengths: Sequence[int], config: LighthouseConfig, comm_type: str
) -> tuple[list[dict[str, int]], dict[str, tuple[int, int]]]:
    """What this rank sends forward, and backward; and what was planned."""
    documents, layout = row_of(lengths), Layout(group.size(), group.rank())
    leaves = [torch.randn(documents.tokens // layout.size, 1, heads, 4, requires_grad=True) for heads in (8, 4, 4)]
    exchange.sent.clear()
    out = lighthouse_attention(*leaves, config, cu_seqlens=documents, cp_group=group, cp_comm_type=comm_type)
    forward = dict(exchange.sent)
    exchange.sent.clear()
    out.sum().backward()
    plan = document_bytes(comm_type, Packing.of(documents, config.rule), Shape(1, 8, 4, 4, 4), layout, config.scorer)
    return [forward, dict(exchange.sent)], plan


def check(size: int, lengths: Sequence[int], config: LighthouseConfig, comm_type: str, rotary: Rotary | None = None) -> None:
    packed = of(tuple(lengths), groups=size if comm_type == "a2a" else 2)
    inputs = [*tensors(packed), *random_like(tensors(packed)[:1])]
    *expected, chosen = layer(None, lengths, inputs, config, comm_type, rotary)
    *answers, entries = zip(*run_ranks(size, layer, lengths, inputs, config, comm_type, rotary), strict=True)
    back = torch.cat(rows_of_ranks(row_of(lengths), size)).argsort()
    for parts, whole in zip(answers, expected, strict=True):
        assert_close(torch.cat(parts)[back], whole, "ranks float64")
    dealt = torch.cat(entries, -1)
    assert torch.equal(dealt.sort().values[..., -chosen.shape[-1] :], chosen.sort().values)
    assert (dealt.sort().values[..., : -chosen.shape[-1]] == -1).all()


CONFIG = LighthouseConfig(levels=3, pooling=2, budget=2, tile_budget=2, document_tile=32, whole_below=0)


@pytest.mark.parametrize("size", SIZES, ids="CP={}".format)
@pytest.mark.parametrize(
    ("kind", "comm_type"),
    [*product(["mixed"], COMM_TYPES), ("one over all ranks", "p2p"), ("whole ones alone", "all_gather")],
)
def test_equals_one_rank(kind: str, comm_type: str, size: int) -> None:
    check(size, ROWS[kind], CONFIG, comm_type)


@pytest.mark.parametrize("scorer", ["summary", "dilated", "gla"])
def test_scorers_equal_one_rank(scorer: str) -> None:
    for rotary in (None, Rotary(torch.tensor([0.8, 0.1]))):
        check(4, MIXED, CONFIG.replace(scorer=scorer), "all_gather", rotary)


@pytest.mark.parametrize("scorer", SCORERS)
def test_ranks_that_hold_no_window_equal_one_rank(scorer: str) -> None:
    """Of the one document that selects, two of the ranks have no token."""
    lengths, last = (10, 12, 10), 7
    shares = Shares.of(Packing.of(row_of(lengths), CONFIG.rule), Layout(8, last))
    assert not shares.packing.is_whole
    assert not any(shares.pieces.given)
    check(8, lengths, CONFIG.replace(scorer=scorer), "p2p", Rotary(torch.tensor([0.8, 0.1])))


@settings(derandomize=True, max_examples=10)
@given(rows(), st.sampled_from([2, 4]), st.sampled_from(COMM_TYPES), st.sampled_from([*SCORERS]))
def test_any_row_equals_one_rank(packed: Packed, size: int, comm_type: str, scorer: str) -> None:
    config = LighthouseConfig(**packed.options)
    if SCORERS[scorer].packed_problem(packed.window) is None:
        config = config.replace(scorer=scorer)
    rest = -packed.seq_length % (2 * size)
    check(size, (*packed.lengths, rest) if rest else packed.lengths, config, comm_type)


@pytest.mark.parametrize(
    ("lengths", "comm_type", "scorer"),
    [
        (MIXED, "p2p", "norm"),
        (MIXED, "a2a", "gla"),
        (MIXED, "all_gather", "dilated"),
        (ROWS["whole ones alone"], "p2p", "norm"),
    ],
    ids=str,
)
def test_ranks_send_what_was_planned(lengths: tuple[int, ...], comm_type: str, scorer: str) -> None:
    for ways, plan in run_ranks(4, sent, lengths, CONFIG.replace(scorer=scorer), comm_type):
        for way, found in enumerate(ways):
            planned = {name: both[way] for name, both in plan.items() if both[way]}
            assert bool(found.pop("deal", 0)) == bool(planned.pop("deal", 0))  # as many as are expected: see below
            assert found == planned


@pytest.mark.parametrize("size", SIZES, ids="CP={}".format)
def test_as_many_rows_are_dealt_as_are_expected(size: int) -> None:
    """Without processes: of 16 heads whose scores are drawn, who gathers each row and who attends to it."""
    packed = of((2938, 1830, 1430, 2800, 772, 1088, 213, 2100, 3213), groups=16, queries_per_group=1, dim=2)
    config = LighthouseConfig(levels=3, pooling=4, budget=16, tile_budget=16, pin_first=False)
    documents = row_of(packed.lengths)
    packing, (query, key, _) = Packing.of(documents, config.rule), tensors(packed)
    (entries,) = lighthouse_select(query, key, config, cu_seqlens=documents)
    shares = Shares.of(packing, Layout(size, 0))
    gathers, attends = (
        shares.owners[entries].long(),
        (shares.row_at[: entries.shape[1]] // len(shares.own_rows)).expand_as(entries),
    )
    moved = gathers != attends
    expected = torch.tensor([dealt(packing, Layout(size, rank)) for rank in range(size)])
    for ways, rank in zip(expected.t(), (gathers, attends), strict=True):
        found = rank[moved].bincount(minlength=size) / len(entries)
        assert (found / ways - 1).abs().max() < 0.35  # one drawing of 16 heads, whose chunks have as few as 13 tokens
        assert abs(found.sum() / ways.sum() - 1) < 0.2
