"""Lighthouse around Wall: by hand from its formula, over ranks as on one, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.context_parallel import exchange
from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.lighthouse.attention import attended_rows
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.reference import gather as take
from megatron_lighthouse.lighthouse.reference import scatter
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.variant import LIGHTHOUSE
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.wall.attention import wall_attention
from megatron_lighthouse.wall.config import WallConfig
from megatron_lighthouse.wall.cut import Step
from megatron_lighthouse.wall.gathered import gather
from tests.context_parallel.shards import shards_of, whole
from tests.ranks import run_ranks
from tests.tolerances import assert_close
from tests.wall.oracle import formula, inputs

ALONE = LighthouseConfig(levels=3, pooling=2, budget=32, tile_budget=4, around="wall")
DEAL = ALONE.replace(tile_budget=32)
TOKENS, BATCH = 256, 2
"""On up to four ranks ALONE has each select in its own tiles, and DEAL deals rows."""
TIED, SCALAR = WallConfig(tied_gates=True), WallConfig(scalar_gate=True)
CASES: dict[str, tuple[dict[str, Any], WallConfig | None]] = {
    "gates of heads": ({}, None),
    "of groups, and sinks": ({"tied": True, "sink": True}, TIED),
    "scalar gates": ({"gate": -2.0, "scalar": -0.2}, SCALAR),
}


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of rows, the last of them shorter."""
    monkeypatch.setattr(Step, "TOKENS", 60)


def around(query: Tensor, key: Tensor, value: Tensor, *gates: Tensor, config: LighthouseConfig = ALONE, **how: Any) -> Tensor:
    """Gates, and a sink where one of these has one dimension."""
    streams, sinks = [x for x in gates if x.dim() > 1], [x for x in gates if x.dim() == 1]
    return lighthouse_attention(query, key, value, config, streams=streams, sinks=sinks[0] if sinks else None, **how)


def given(heads: int, groups: int, dims: tuple[int, int] = (6, 6), tokens: int = TOKENS, **more: Any) -> list[Tensor]:
    """As `inputs`, scalar gates as streams have them."""
    found = inputs(tokens, more.pop("batch", BATCH), heads, groups, dims, **more)
    return [x.unsqueeze(-1) if x.dim() == 3 else x for x in found]


def with_grads(attention: Any, tensors: list[Tensor], **how: Any) -> list[Tensor]:
    *leaves, grad = (x.detach().clone().requires_grad_() for x in tensors)
    out = attention(*leaves, **how)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.detach())]


def by_hand(selection: Selection) -> Any:
    """Row by row, in the order that the selection has, by differences of prefix sums."""

    def rows_of(x: Tensor, sums: Tensor | None, pooled: bool) -> Tensor:
        """[S, B, heads, ·]: means, of keys that have decayed where there are sums of gates; or gates since the row before."""
        own = x.unflatten(2, (selection.places.shape[1], -1))
        heads = own.shape[3] if sums is None else sums.shape[2] // own.shape[2]
        found = []
        for b, of_batch in enumerate(selection.indices.tolist()):
            for s, entries in enumerate(of_batch):
                some, before = own[:, b, s].repeat_interleave(heads // own.shape[3], 1), 0.0
                total = None if sums is None else sums.unflatten(2, (own.shape[2], -1))[:, b, s]
                rows = []
                for entry in entries:
                    level = max(i for i in range(selection.geometry.levels) if entry >= selection.geometry.offset(i))
                    window = selection.geometry.window(level)
                    begin = (entry - selection.geometry.offset(level)) * window
                    part, last = some[begin : begin + window], begin + window - 1
                    if not pooled:
                        now = some[: last + 1].sum(0)
                        rows.append(now - before)
                        before = now
                    else:
                        decay = 1 if total is None else (total[last] - total[begin : last + 1]).exp()
                        rows.append((part * decay).mean(0))
                found.append(torch.stack(rows))
        batch, selections = selection.places.shape[:2]
        return torch.stack(found, 1).unflatten(1, (batch, selections)).flatten(2, 3)

    def attention(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, *more: Tensor) -> Tensor:
        rows_q, rows_v = rows_of(query, None, True), rows_of(value, None, True)
        rows_k, rows_g = rows_of(key, gate.cumsum(0), True), rows_of(gate, None, False)
        others = [rows_of(x, None, False).squeeze(-1) if x.dim() > 1 else x for x in more]
        named = {"sink" if x.dim() == 1 else "scalar_gate": x for x in others}
        return scatter(formula(rows_q, rows_k, rows_v, rows_g, **named), selection)

    return attention


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shared", [1, 2], ids="{} heads a selection".format)
def test_rows_by_hand(name: str, shared: int) -> None:
    """Output and gradients, with grouped heads and V that is not K."""
    more, options = CASES[name]
    config = LighthouseConfig(levels=3, pooling=2, budget=8, tile_budget=4, around="wall", heads_per_selection=shared)
    tensors = given(4, 2, (5, 3), tokens=48, **more)
    selection = attended_rows(*tensors[:3], config.replace(around="softmax")).selection
    expected = with_grads(by_hand(selection), tensors)
    for one, other in zip(with_grads(around, tensors, config=config, around=options), expected, strict=True):
        assert_close(one, other, "ranks float64")


def test_a_window_has_the_mean_of_its_tokens_logits() -> None:
    """For the query of every later row, whatever was gathered between."""
    query, key, value, gate, _ = given(1, 1, tokens=32, batch=1)
    selection = attended_rows(query, key, value, ALONE.replace(around="softmax", budget=8), streams=[]).selection
    _, rows_k, _, rows_g = gather(lambda *x: take(*x, selection), selection, query, key, value, gate)
    (entries,), sums = selection.indices[0].tolist(), gate.cumsum(0)
    window = selection.geometry.window(2)
    at = next(i for i, entry in enumerate(entries) if entry >= selection.geometry.offset(2))
    begin = (entries[at] - selection.geometry.offset(2)) * window
    exact = (key[begin : begin + window] * (sums[-1] - sums[begin : begin + window]).exp()).mean(0)
    assert_close(rows_k[at] * rows_g[at + 1 :].sum(0).exp(), exact, "float64")


def test_without_gates_it_is_lighthouse_without_positions() -> None:
    query, key, value, gate, grad = given(4, 2, gate=0.0)
    found = with_grads(around, [query, key, value, gate, grad])
    plain = with_grads(around, [query, key, value, grad], config=ALONE.replace(around="softmax"))
    for one, other in zip(found, plain, strict=False):
        assert_close(one, other, "ranks float64")


def test_gradients_by_finite_differences() -> None:
    config = LighthouseConfig(levels=2, pooling=2, budget=2, tile_budget=2, around="wall")
    *leaves, _ = (x.requires_grad_() for x in given(2, 1, (2, 2), tokens=8, batch=1, scalar=-0.5, sink=True))
    selection = attended_rows(*leaves[:3], config.replace(around="softmax")).selection
    how: dict[str, Any] = {"config": config, "selection": selection, "around": SCALAR}
    assert torch.autograd.gradcheck(lambda *x: around(*x, **how), leaves)


def test_nothing_before_a_token_knows_of_it() -> None:
    """Selection held fixed: to the bit."""
    tensors = given(4, 2)[:-1]
    selection = attended_rows(*tensors[:3], ALONE.replace(around="softmax")).selection
    before = around(*tensors, selection=selection)
    for x in tensors:
        x[101] -= 1.0
    after = around(*tensors, selection=selection)
    assert torch.equal(before[:101], after[:101])
    assert not torch.equal(before[101:], after[101:])


@pytest.mark.parametrize("gate", [-50.0, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gates_of_any_size_are_finite(gate: float, dtype: torch.dtype) -> None:
    """Keys and gates in their own dtypes; a gate that closes one head's channel leaves the others."""
    query, key, value, gates, grad = given(4, 2)
    gates[10:90, :, 1, 2] = gate
    rows = [x.to(dtype) for x in (query, key, value)]
    found = with_grads(around, [*rows, gates.to(torch.promote_types(dtype, torch.float32)), grad.to(dtype)])
    assert all(x.isfinite().all() for x in found)
    assert found[0].dtype == found[2].dtype == dtype


def test_packed_documents_are_as_alone() -> None:
    """Long enough to select, and whole, which is Wall itself. None sees another's, nor fades by its gates."""
    config = LighthouseConfig(levels=3, pooling=2, budget=4, tile_budget=2, around="wall")
    tensors = given(4, 2, batch=1, gate=-1.0, scalar=-0.2)
    bounds = torch.tensor([0, 96, 103, 256], dtype=torch.int32)
    found = with_grads(around, tensors, config=config, cu_seqlens=bounds, around=SCALAR)
    for begin, end in pairwise(bounds.tolist()):
        part, alone = [x[begin:end] for x in tensors], torch.tensor([0, end - begin], dtype=torch.int32)
        expected = with_grads(around, part, config=config, cu_seqlens=alone, around=SCALAR)
        for one, other in zip(found, expected, strict=True):
            assert_close(one[begin:end], other, "ranks float64")
        *rows, scalar, _ = part
        if end - begin == 7:
            assert_close(found[0][begin:end], wall_attention(*rows, scalar_gate=scalar.squeeze(-1)), "ranks float64")
        assert not found[4][begin].any()


def over_ranks(group: dist.ProcessGroup, cases: list[tuple[list[Tensor], dict[str, Any]]]) -> list[list[Tensor]]:
    found, tokens = [], Step.TOKENS
    Step.TOKENS = 5
    for tensors, how in cases:
        rows = [x if x.dim() == 1 else shards_of(group, [x])[0] for x in tensors]
        found.append(with_grads(around, rows, cp_group=group, **how))
    Step.TOKENS = tokens
    return found


@pytest.mark.parametrize(
    ("size", "comm_type"),
    [
        *((2, comm_type) for comm_type in COMM_TYPES),
        *((4, comm_type) for comm_type in ("p2p", "a2a")),
        *(pytest.param(8, comm_type, marks=pytest.mark.slow) for comm_type in ("p2p", "all_gather")),
    ],
)
def test_ranks_equal_one(comm_type: str, size: int) -> None:
    """Where ranks select alone and where they deal; eight of them deal in both."""
    groups = max(2, size) if comm_type == "a2a" else 2
    cases = [
        (
            given(2 * groups, groups, (3, 2), 128, **more),
            {"config": ALONE.replace(budget=16, tile_budget=tiles), "softmax_scale": 0.8, "around": options},
        )
        for tiles, (more, options) in zip((2, 16, 16), CASES.values(), strict=True)
    ]
    ranks = run_ranks(size, over_ranks, [(x, {"cp_comm_type": comm_type, **how}) for x, how in cases])
    for (tensors, how), shards in zip(cases, zip(*ranks, strict=True), strict=True):
        for expected, found in zip(with_grads(around, tensors, **how), zip(*shards, strict=True), strict=True):
            together = sum(found) if expected.dim() == 1 else whole(found)
            assert_close(together, expected, "ranks float64")


HEADS, GROUPS, DIM = 8, 4, 8


def sent_by(group: dist.ProcessGroup, config: LighthouseConfig, comm_type: str, options: WallConfig) -> list[dict[str, int]]:
    """What this rank sends forward, and backward, of rows in bfloat16 and gates in float32."""
    more = {"tied": options.tied_gates, "scalar": -0.1 if options.scalar_gate else None}
    query, key, value, *gates, grad = shards_of(group, given(HEADS, GROUPS, (DIM, DIM), **more))
    rows = [x.bfloat16().requires_grad_() for x in (query, key, value)]
    gates = [x.float().requires_grad_() for x in gates]
    exchange.sent.clear()
    out = around(*rows, *gates, config=config, around=options, cp_group=group, cp_comm_type=comm_type)
    forward = dict(exchange.sent)
    exchange.sent.clear()
    out.backward(grad.bfloat16())
    return [forward, dict(exchange.sent)]


@pytest.mark.parametrize("comm_type", ["p2p", "a2a"])
@pytest.mark.parametrize(
    ("config", "options"), [(ALONE, WallConfig()), (DEAL, WallConfig(tied_gates=True, scalar_gate=True))], ids=["alone", "deal"]
)
def test_ranks_send_what_was_counted(config: LighthouseConfig, options: WallConfig, comm_type: str) -> None:
    """What is dealt, which depends on the data, is most of what it can be."""
    for rank, ways in enumerate(run_ranks(4, sent_by, config, comm_type, options)):
        shape = Shape(BATCH, HEADS, GROUPS, DIM, 2)
        plan = LIGHTHOUSE.sent(config, TOKENS, shape, Layout(4, rank), comm_type, options)
        for way, sent in enumerate(ways):
            planned = {name: both[way] for name, both in plan.items() if both[way]}
            assert sent.pop("deal", 0) <= planned.pop("deal", 0)
            assert sent == planned


Q, G = (64, 1, 4, 6), (64, 1, 2, 6)


@pytest.mark.parametrize(
    ("streams", "how", "says"),
    [
        ([], {}, r"config.around wall reads 1 \(g\) besides query, key and value, got 0"),
        ([Q, Q], {}, r"reads 1 \(g\) .* got 2: pass as many. Scalar gates are read with around=WallConfig\(scalar_gate=True\)"),
        ([G], {}, r"g of config.around wall must be \(64, 1, 4, 6\), .*with gates of a group, around=WallConfig\(tied"),
        ([Q, Q], {"around": SCALAR}, r"gs of config.around wall must be \(64, 1, 4, 1\)"),
        (
            [Q],
            {"rotary": Rotary(torch.tensor([0.3]))},
            "config.around wall fades keys to their window's end, and turns none: leave `rotary` out",
        ),
        ([Q], {"cp_comm_type": "mail"}, "cp_comm_type mail is not known"),
    ],
)
def test_what_cannot_be_is_refused(streams: list[tuple[int, ...]], how: dict[str, Any], says: str) -> None:
    query, key = torch.zeros(Q), torch.zeros(G)
    with pytest.raises(ValueError, match=says):
        lighthouse_attention(query, key, key, ALONE.replace(budget=8), streams=[torch.zeros(x) for x in streams], **how)


@pytest.mark.parametrize("bad", [1e-3, torch.nan])
def test_gates_above_0_are_refused(bad: float) -> None:
    query, key, value, gate, _ = given(4, 2)
    gate[3, 0, 1, 2] = bad
    with pytest.raises(ValueError, match=r"g of config\.around wall must be natural logarithms <= 0"):
        around(query, key, value, gate)


def test_backends_of_softmax_are_refused() -> None:
    with pytest.raises(ValueError, match=r"config\.inner fa3 is of softmax attention, and config\.around wall has kernels"):
        ALONE.replace(inner="fa3")
