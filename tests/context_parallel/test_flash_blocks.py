"""FlashAttention 4's and 3's blocks, by stand-ins that keep their contracts: against autograd in float64, and over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.parts import Block
from megatron_lighthouse.context_parallel.schemes import scheme
from megatron_lighthouse.context_parallel.windowed import Windowed
from megatron_lighthouse.softmax import backends, names
from megatron_lighthouse.softmax.blocks import BLOCKS, Plain, block_for
from megatron_lighthouse.softmax.document_blocks import OneByOne
from megatron_lighthouse.softmax.flash_blocks import Flash3, Flash4
from megatron_lighthouse.softmax.inputs import check_backend
from megatron_lighthouse.softmax.rows import RowKind
from megatron_lighthouse.softmax.sharded_documents import sharded_documents_attention
from megatron_lighthouse.softmax.sinks import sinks_attention
from tests.context_parallel.shards import exchange_of, inputs_of, shards_of, together
from tests.context_parallel.test_blocks import ALL, CAUSAL, SCALE, attention, by_heads, randn
from tests.flash_stand_ins import ASKED, FUNCTIONS, installed
from tests.oracle import Problem
from tests.steps import restride
from tests.test_sinks import SCALE as SINKS_SCALE
from tests.test_sinks import answers, formula, sinks_like
from tests.tolerances import assert_close

each = pytest.mark.parametrize("name", ["fa4", "fa3"])
PROBLEM = Problem(64, 3, 2, 8, 2, batch=2, groups=2, queries_per_group=2, dim=8, seed=3)


def half(heads: int, dim: int = 64) -> Tensor:
    return torch.zeros(1, 1, heads, dim, dtype=torch.bfloat16)


def block_of(name: str, window: int | None = None, scale: float = SCALE) -> Block:
    """Chosen for bf16, for they take no more; what the stand-ins are then given is float64."""
    return block_for(name, half(4), half(2), scale, None, window)


@pytest.fixture(autouse=True)
def tried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU had run them, but where the test is of that."""
    if "untried" not in request.node.name:
        monkeypatch.setattr(backends, "untried", lambda *_: False)


def test_auto_takes_none_that_are_untried() -> None:
    assert chosen("fa4", "fa3") is Flash4
    assert chosen("fa3") is chosen("fa4", capability=100) is Plain
    assert names.untried("fa4", 9, names.NARROWER)


@each
@by_heads
@pytest.mark.parametrize("strides", ["contiguous", "slices of one fused projection", "batch and heads first"])
@pytest.mark.parametrize(("n", "m", "causal"), [(7, 7, True), (7, 7, False), (4, 9, False), (9, 4, False)], ids=str)
def test_equals_autograd(n: int, m: int, causal: bool, heads: int, groups: int, strides: str, name: str) -> None:
    query, key, value = randn(n, 2, heads, 8, seed=1), randn(m, 2, groups, 8, seed=2), randn(m, 2, groups, 8, seed=3)
    leaves = q, k, v = [x.clone().requires_grad_() for x in (query, key, value)]
    out, lse = attention(q, k, v, causal)
    grad = randn(*out.shape, seed=4)
    expected = torch.autograd.grad(out, leaves, grad)
    if n == m:
        query, key, value = restride(strides, query, key, value)
    with installed(name):
        block, mask = block_of(name), CAUSAL if causal else ALL
        part = block.forward((query,), (key, value), mask)
        near, far = block.backward(grad, (query,), (key, value), part, mask)
    assert type(block) is {"fa4": Flash4, "fa3": Flash3}[name]
    for x, y in zip((block.output(part), part.lse, *near, *far), (out, lse, *expected), strict=True):
        assert_close(x, y, "float64")


@each
@pytest.mark.parametrize("window", [0, 3, 20])
def test_windows_equal_plain_ones(window: int, name: str) -> None:
    query, key, value, grad = randn(5, 2, 4, 8, seed=1), randn(9, 2, 2, 8, seed=2), randn(9, 2, 2, 8, seed=3), randn(5, 2, 4, 8)
    found = []
    with installed(name):
        for block in (block_of(name, window), Plain(SCALE, window)):
            part = block.forward((query,), (key, value), CAUSAL)
            near, far = block.backward(grad, (query,), (key, value), part, CAUSAL)
            found.append((part.averages[0], part.lse, *near, *far))
    for x, y in zip(*found, strict=True):
        assert_close(x, y, "float64")


def over_ranks(
    group: dist.ProcessGroup,
    inputs: list[Tensor],
    name: str,
    comm_type: str,
    window: int | None = None,
    scale: float = SCALE,
) -> list[Tensor]:
    """Output and gradients of this rank's tokens."""
    *rows, grad = shards_of(group, inputs)
    query, key, value = (x.requires_grad_() for x in rows)
    exchange = Exchange.over(group)
    assert exchange is not None

    def no_whole() -> Any:
        raise AssertionError("of 'a2a' alone")

    with installed(name):
        block = block_of(name, window, scale)
        ring = scheme(comm_type, exchange, lambda: block, no_whole)
        out = (ring if window is None else Windowed(block, exchange, window))((query,), (key, value))
        return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]


def by_formula(inputs: list[Tensor]) -> list[Tensor]:
    leaves = q, k, v = [x.double().requires_grad_() for x in inputs[:3]]
    out = attention(q, k, v, causal=True)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].double())]


@each
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather"])
def test_over_ranks_equals_one_process(comm_type: str, size: int, name: str) -> None:
    inputs = inputs_of(PROBLEM)
    found = together(size, over_ranks, inputs, name, comm_type)
    for x, y in zip(found, by_formula(inputs), strict=True):
        assert_close(x, y, "ranks float64")


@each
def test_over_ranks_in_bf16_sums_are_fp32_and_the_backward_is_given_bf16(name: str) -> None:
    inputs = inputs_of(PROBLEM, "bfloat16")
    found = together(4, over_ranks, inputs, name, "p2p")
    assert {x.dtype for x in found} == {torch.bfloat16}
    for x, y in zip(found, by_formula(inputs), strict=True):
        assert_close(x, y, "bfloat16")


@each
def test_windows_over_ranks_equal_one_process(name: str) -> None:
    *rows, grad = inputs_of(PROBLEM)
    leaves = q, k, v = [x.clone().requires_grad_() for x in rows]
    out = formula(q, k, v, torch.full((4,), -torch.inf), 19)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    found = together(2, over_ranks, [*rows, grad], name, "p2p", 19, SINKS_SCALE)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, "ranks float64")


@each
def test_sinks_enter_by_the_log_sum_exp(name: str) -> None:
    query, key, value, grad = inputs_of(PROBLEM)
    given = query, key, value, grad, sinks_like(query)
    with installed(name):
        attend = sinks_attention(name, half(4), half(2), SINKS_SCALE)
        found = answers(attend, *given)
    for x, y in zip(found, answers(formula, *given), strict=True):
        assert_close(x, y, "float64")


@pytest.mark.parametrize("deterministic", [False, True])
@each
def test_the_backward_repeats_where_torch_is_asked_for_it(name: str, deterministic: bool) -> None:
    query, key = randn(4, 1, 4, 8), randn(4, 1, 2, 8)
    ASKED.clear()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with installed(name):
            block = block_of("auto")
            part = block.forward((query,), (key, key), CAUSAL)
            block.backward(query, (query,), (key, key), part, CAUSAL)
            wide = block_for("auto", half(4, 256), half(2, 256), SCALE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [deterministic] == ASKED
    assert isinstance(block, BLOCKS[name])
    # FlashAttention 3's does not, of so many channels
    assert isinstance(wide, BLOCKS[name]) == (name == "fa4" or not deterministic)


def chosen(*there: str, **how: Any) -> type:
    with installed(*there, **how):
        return type(block_of("auto"))


def test_auto_takes_them_in_the_order_of_one_gpu_and_says_which(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen("fa4", "fa3") is chosen("fa4") is chosen("fa4", capability=100) is Flash4
    assert chosen("fa3") is Flash3
    assert "over shards of bfloat16, 4 query and 2 key/value heads of 64 is FlashAttention 4." in caplog.messages[0]
    assert "is FlashAttention 3 (FlashAttention 4 is not installed (flash-attn-4))" in caplog.text
    assert chosen("fa4", "fa3", capability=80) is Plain
    assert chosen("fa4", release="is installed as 4.0.0b12") is Plain
    assert "(FlashAttention 4 is installed as 4.0.0b12; FlashAttention 3 is not installed" in caplog.text


def refusal(name: str, dim: int = 64, there: tuple[str, ...] = ("fa4", "fa3"), **how: Any) -> str:
    """When the layer is built."""
    with installed(*there, **how), pytest.raises(ValueError, match=f"^config.inner {name} cannot run: ") as error:
        check_backend(name, RowKind(torch.device("cpu"), torch.bfloat16, 4, 2, dim, dim), 2, "p2p")
    return str(error.value)


def test_what_is_forced_and_cannot_run_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "FlashAttention 4 is not installed (flash-attn-4). For bfloat16" in refusal("fa4", there=())
    assert "FlashAttention 4 is installed as 4.0.0b12. " in refusal("fa4", release="is installed as 4.0.0b12")
    assert "does not take head dimension 192. For" in (said := refusal("fa4", 192, capability=100))
    assert said.endswith("use config.inner auto or sdpa.")
    assert "FlashAttention 3 does not run on this device" in refusal("fa3", capability=100)
    monkeypatch.setitem(FUNCTIONS["fa4"]["flash_attn.cute.interface"], "_flash_attn_bwd", lambda q, k, v, deterministic: q)
    assert "too old or too new: its _flash_attn_bwd takes no causal, softmax_scale, window_size_left" in refusal("fa4")
    monkeypatch.delitem(FUNCTIONS["fa4"]["flash_attn.cute.interface"], "_flash_attn_bwd")
    assert "is installed but does not import (module 'flash_attn.cute.interface' has no attribute" in refusal("fa4")


def test_operators_that_name_no_options_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlashAttention 3's backward is, a custom operator of torch."""
    functions = FUNCTIONS["fa3"]["flash_attn_interface"]
    own = functions["_flash_attn_backward"]
    monkeypatch.setitem(functions, "_flash_attn_backward", lambda *args, **kwargs: own(*args, **kwargs))
    assert chosen("fa3") is Flash3


def test_windows_of_256_channels_are_not_flash_attention_4s_on_blackwell() -> None:
    for capability, kind in ((90, Flash4), (100, Plain)):
        with installed("fa4", capability=capability):
            assert type(block_for("auto", half(4, 256), half(2, 256), SCALE, window=8)) is kind
            assert type(block_for("auto", half(4, 256), half(2, 256), SCALE)) is Flash4


def test_documents_over_shards_are_not_theirs() -> None:
    """They would take one at a time."""
    query, key = half(4), half(2)
    with installed("fa4", "fa3"):
        attend = sharded_documents_attention("auto", query, key, exchange_of(2, 0), "p2p")
        assert attend.within == OneByOne(Plain(64**-0.5))
        with pytest.raises(ValueError, match="inner fa4 does not attend over shards of packed documents"):
            sharded_documents_attention("fa4", query, key, exchange_of(2, 0), "p2p")


@pytest.mark.gpu
@each
@pytest.mark.parametrize(
    ("n", "m", "causal", "window"), [(1024, 1024, True, None), (512, 1024, False, None), (512, 768, True, 99)]
)
def test_the_real_ones_keep_their_contract(n: int, m: int, causal: bool, window: int | None, name: str) -> None:
    """Beside plain PyTorch in float64, of the same bf16 rows."""
    rows = [randn(*shape, seed=i).bfloat16().cuda() for i, shape in enumerate(((n, 2, 4, 64), (m, 2, 2, 64), (m, 2, 2, 64)))]
    try:
        block = block_for(name, rows[0], rows[1], SCALE, window=window)
    except ValueError as error:
        pytest.skip(str(error))
    grad, mask = randn(n, 2, 4, 64).bfloat16().cuda(), CAUSAL if causal else ALL
    found = []
    for one, (query, key, value, g) in ((block, (*rows, grad)), (Plain(SCALE, window), [x.double() for x in (*rows, grad)])):
        part = one.forward((query,), (key, value), mask)
        near, far = one.backward(g, (query,), (key, value), part, mask)
        found.append((*part.averages, part.lse, *near, *far))
    for x, y in zip(*found, strict=True):
        assert (x.double() - y).norm() < 2**-7 * y.norm()
