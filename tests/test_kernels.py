"""The kernels as a whole: the same layer as the reference, through torch.compile too, and compiled for GPUs not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, Rotary, lighthouse_attention, lighthouse_select
from megatron_lighthouse.kernels.lighthouse.gather import NOT_TURNED
from megatron_lighthouse.lighthouse.geometry import Geometry
from tests.compiled import compiled
from tests.oracle import Problem, attention
from tests.steps import DEVICE, poisoned, rounded, tensors
from tests.test_golden import config_of as golden_config
from tests.test_golden import tensor as golden_tensor
from tests.tolerances import assert_close

PROBLEM = Problem(96, 3, 2, 8, 4, batch=2, groups=2, queries_per_group=2, dim=8, seed=5)
SMALL = replace(PROBLEM, seq_length=48, batch=1)
CONFIG = LighthouseConfig(**PROBLEM.options, steps="kernels")


def differentiated(layer, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients, for a random gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = layer(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def test_the_layer_equals_the_oracle() -> None:
    inputs = tensors(PROBLEM, "float32")
    with poisoned():
        out = lighthouse_attention(*inputs, CONFIG)
    indices, expected = attention(*(x.double().cpu().numpy() for x in inputs), PROBLEM)
    np.testing.assert_array_equal(lighthouse_select(*inputs[:2], CONFIG).cpu().numpy(), indices)
    assert_close(out, expected, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", rounded])
def test_the_layer_equals_the_reference(dtype: str) -> None:
    inputs = tensors(PROBLEM, dtype)
    with poisoned():
        actual = differentiated(lambda *x: lighthouse_attention(*x, CONFIG), inputs)
    wide = CONFIG.replace(steps="reference")
    expected = differentiated(lambda *x: lighthouse_attention(*x, wide), [x.double() for x in inputs])
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == inputs[0].dtype
        assert_close(a, b, dtype)


@pytest.mark.parametrize("name", ["case_a", "case_d"])
def test_golden_vectors(name: str) -> None:
    case = dict(np.load(Path(__file__).parent / "golden" / f"{name}.npz"))
    config = golden_config(case).replace(steps="kernels")
    query, key, value, grad = (golden_tensor(case, x).to(DEVICE) for x in ("q", "k", "v", "dout"))
    np.testing.assert_array_equal(lighthouse_select(query, key, config)[0].cpu().numpy(), case["indices"])
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = lighthouse_attention(*leaves, config)
    for x, actual in zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, grad)), strict=True):
        assert_close(actual, golden_tensor(case, x), "golden")


def test_bit_identical_from_run_to_run() -> None:
    inputs = tensors(PROBLEM, "float32")
    first, second = (differentiated(lambda *x: lighthouse_attention(*x, CONFIG), inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("more", [{}, {"causal_selection": True}, {"around": "parallax"}], ids=str)
def test_a_compiled_layer_around_it_has_no_graph_break(more: dict[str, Any]) -> None:
    config = CONFIG.replace(**more)

    def layer(query: Tensor, key: Tensor, value: Tensor, *streams: Tensor) -> Tensor:
        return lighthouse_attention(2 * query, key, value, config, streams=streams).sin()

    inputs = tensors(PROBLEM, "float32")
    if "around" in more:
        inputs.append(torch.randn_like(inputs[0]).requires_grad_())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(differentiated(compiled, inputs), differentiated(layer, inputs), strict=True):
        assert_close(a, b, "float32")


def test_fake_implementations_are_those_of_the_ops() -> None:
    """Shapes, dtypes, no aliasing: torch's own check of every custom op."""
    query, key, value = tensors(SMALL, "float32")
    geometry = LighthouseConfig(**SMALL.options).geometry(SMALL.seq_length)
    sizes = [*geometry.pyramid, geometry.gathered_length, 1]
    ops, checks = torch.ops.lighthouse, ["test_schema", "test_faketensor"]
    scores = ops.score(query, key, geometry.pyramid)
    places = ops.select(scores, geometry.sizes, True)
    rotary = Rotary(torch.ones(query.shape[-1] // 2))
    plain, turned = (None, NOT_TURNED), (rotary.turns(geometry.window(geometry.levels - 1), query.device), rotary.pairing)
    rows = ops.gather(query, key, value, places, sizes, *plain)
    out = ops.scatter(rows[0], None, places, sizes)
    for op, args in (
        (ops.score, (query, key, geometry.pyramid)),
        (ops.select, (scores, geometry.sizes, True)),
        *((ops.gather, (query, key, value, places, sizes, *how)) for how in (plain, turned)),
        *((ops.gather_backward, (*rows, places, sizes, *how)) for how in (plain, turned)),
        (ops.scatter, (rows[0], None, places, sizes)),
        *((ops.scatter_backward, (out, places, sizes, True, some_silent)) for some_silent in (False, True)),
        (ops.select_causally, (scores, geometry.sizes)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "dtype", "rule"),
    [
        pytest.param({}, "float64", "they take bf16, fp16 and fp32, not torch.float64", id="float64"),
        pytest.param({"dim": 264}, "float32", "head dimensions up to 256, not 264", id="D=264"),
    ],
)
def test_forced_kernels_that_cannot_run_are_refused(change: dict[str, int], dtype: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        lighthouse_attention(*tensors(replace(PROBLEM, **change), dtype), CONFIG)


def test_a_cpu_takes_the_reference_and_kernels_only_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.lighthouse import implementations, reference

    x = torch.zeros(1)
    assert implementations.steps_for("auto", x) is reference
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"config\.steps kernels cannot run: they run on GPUs, not on the device 'cpu'"):
        implementations.steps_for("kernels", x)


@pytest.mark.parametrize("pooling", [16, 32])
def test_a_pooling_that_the_kernels_are_not_made_for_is_said_once(
    pooling: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from megatron_lighthouse import notice
    from megatron_lighthouse.lighthouse import implementations

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    notice._say.cache_clear()
    for _ in range(2):
        implementations.steps_for("kernels", torch.zeros(1), pooling)
    assert len(caplog.messages) == (pooling > 16)
    assert all("a pooling of 2 to 16: at 32" in said for said in caplog.messages)


LAYERS = {
    "98K, bf16, D=128": ((98304, 3, 4, 1536, 128), "bf16", 128),
    "1M, fp32, D=256": ((1048576, 4, 4, 4096, 128), "fp32", 256),
    "p=8, fp16, D=80": ((32768, 3, 8, 128, 128), "fp16", 80),
    "p=3, bf16, D=64, one tile": ((98304 * 3, 3, 3, 1536, 1536), "bf16", 64),
}


FIRST, *REST = LAYERS
CAPABILITIES = (90, 100)


@pytest.mark.parametrize("layer", [FIRST, *(pytest.param(layer, marks=pytest.mark.slow) for layer in REST)])
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)
def test_compiles_for_hopper_and_blackwell_without_spills(capability: int, layer: str) -> None:
    calls = [("compile_all", c, *LAYERS[one]) for one in ([FIRST] if layer == FIRST else REST) for c in CAPABILITIES]
    reports = compiled(*calls)["compile_all", capability, *LAYERS[layer]]
    assert len(reports) == 21
    for kernel, registers, shared_bytes, spilled_bytes in reports:
        print(f"sm_{capability} {kernel}: {registers} registers, {shared_bytes} bytes shared, {spilled_bytes} spilled")
        assert spilled_bytes == 0, kernel
        assert 0 < registers <= 255
        # these work on tiles as FlashAttention does; Hopper and Blackwell have 227 KiB for them
        attends = kernel in ("lighthouse_attended", "lighthouse_mass_rows", "lighthouse_mass_columns")
        assert shared_bytes <= (227 if attends else 48) * 1024


@pytest.mark.gpu
def test_more_rows_than_a_launch_grid_holds() -> None:
    """S = 131,072: the authors' launch grid ends at 65,535."""
    config = LighthouseConfig(levels=2, pooling=2, budget=32768, tile_budget=128)
    assert config.geometry(2**17).gathered_length == 131072
    inputs = [torch.randn(2**17, 1, 1, 32, device="cuda") for _ in range(3)]
    selection = [config.replace(steps=name) for name in ("kernels", "reference")]
    assert torch.equal(*(lighthouse_select(*inputs[:2], c) for c in selection))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    inputs = [torch.randn(4096, 1, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    config = LighthouseConfig(3, 4, 64, 64, inner="fa2")
    lighthouse_attention(*inputs, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lighthouse_attention(*inputs, config)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, lighthouse_attention(*inputs, config))


def test_geometry_is_made_again_from_its_sizes() -> None:
    geometry = CONFIG.geometry(PROBLEM.seq_length)
    assert Geometry(*geometry.sizes) == geometry
