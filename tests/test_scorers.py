"""Scorers: what they score, the same on any number of context-parallel ranks, and what they refuse."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from threading import Barrier, Lock
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import versions
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.steps import Steps
from megatron_lighthouse.options import in_flags
from megatron_lighthouse.sequence.layout import Layout
from tests.oracle import Problem
from tests.scorer_oracle import oracle, pyramid_of
from tests.steps import LAYOUTS, both, poisoned, precision, restride, tensors
from tests.tolerances import assert_close

# the package has the function under the module's name
ROOT = Path(__file__).parents[1]
gla = import_module("megatron_lighthouse.lighthouse.scorers.gla")
linear = import_module("megatron_lighthouse.lighthouse.scorers.linear")


def in_plain_pytorch(monkeypatch: pytest.MonkeyPatch, segment: int, block: int) -> None:
    """Gated linear attention as on a CPU, which counts in fp32."""
    monkeypatch.setattr(gla, "SEGMENT", segment)
    monkeypatch.setattr(gla, "BLOCK", block)
    monkeypatch.setattr(linear, "_flash_linear_attention", lambda: linear.plain)


SCALE = 0.9
"""That no D gives by itself."""
PROBLEMS = {
    "grouped queries": Problem(96, 3, 2, 8, 4, batch=2, groups=2, queries_per_group=3, dim=8),
    "a head for each": Problem(72, 2, 3, 4, 4, groups=2, dim=5),
}


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", PROBLEMS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_equals_the_oracle(scorer: str, shape: str, layout: str, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    # segments that do not divide a stream, and blocks that do not divide a segment
    in_plain_pytorch(monkeypatch, segment=7, block=3)
    case = PROBLEMS[shape]
    inputs = tensors(case, precision(steps))
    expected = oracle(scorer, *(x.double().cpu().numpy() for x in inputs), case)
    with poisoned():
        scores = SCORERS[scorer](*restride(layout, *inputs), pyramid_of(case), steps, None)
    assert scores.dtype == inputs[0].dtype
    assert_close(scores, expected, precision(steps))


@both
@pytest.mark.parametrize("scorer", SCORERS)
def test_those_that_attend_take_the_scale_of_the_softmax(scorer: str, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    in_plain_pytorch(monkeypatch, segment=7, block=3)
    case = PROBLEMS["grouped queries"]
    inputs, how = tensors(case, precision(steps)), (pyramid_of(case), steps, None, None)
    found = SCORERS[scorer](*inputs, *how, SCALE)
    assert_close(found, oracle(scorer, *(x.double().cpu().numpy() for x in inputs), case, SCALE), precision(steps))
    assert torch.equal(found, SCORERS[scorer](*inputs, *how)) != SCORERS[scorer].by_scale


def in_ranks(size: int, function: Callable[[Exchange], Tensor]) -> list[Tensor]:
    """What `function` returns on each of `size` ranks: threads that take turns, and change over where they exchange."""
    barrier, turn, slots = Barrier(size), Lock(), [torch.empty(0)] * size

    class Threads(Exchange):
        def all_gather(self, x: Tensor, purpose: str) -> Tensor:
            assert purpose == "scorer"
            slots[self.rank] = x
            turn.release()
            barrier.wait(60)
            gathered = torch.stack(slots)
            barrier.wait(60)
            turn.acquire()
            return gathered

    def run(rank: int) -> Tensor:
        with turn:
            return function(Threads(None, Layout(size, rank)))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def of_ranks(
    scorer: str, size: int, case: Problem, steps: Steps, inputs: list[Tensor], scale: float | None = None
) -> list[Tensor]:
    """The scores of the whole sequence, level by level [2, B, G, N/p^l], put together from those of `size` ranks."""
    here = replace(pyramid_of(case), seq_length=case.seq_length // size)

    def score(exchange: Exchange) -> Tensor:
        return SCORERS[scorer](*(exchange.own(x) for x in inputs), here, steps, exchange, None, scale)

    scores = torch.stack(in_ranks(size, score))
    exchange, levels = (
        Exchange(None, Layout(size, 0)),
        scores.split([here.entries(level) for level in range(1, here.levels)], -1),
    )
    return [exchange.in_order(x.movedim(-1, 1)).movedim(0, -1) for x in levels]


@both
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_have_the_same_bits_on_any_number_of_ranks(
    scorer: str, size: int, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_plain_pytorch(monkeypatch, segment=4, block=3)
    length = 128 if scorer == "gla" else 64  # its chunks on ranks are whole segments
    case = Problem(length, 3, 2, 8, 4, batch=2, groups=2, queries_per_group=2, dim=8)
    inputs = tensors(case, precision(steps))
    expected = SCORERS[scorer](*inputs, pyramid_of(case), steps, None, None, SCALE)
    found = torch.cat(of_ranks(scorer, size, case, steps, inputs, SCALE), -1)
    if scorer == "gla" and found.is_cuda:  # cuBLAS adds up in an order that hangs on the shape
        assert_close(found, expected, "float64" if found.dtype == torch.float64 else "float32")
    else:
        assert torch.equal(found, expected)


@both
def test_mass_has_the_same_bits_where_tiles_lie_in_chunks(steps: Steps) -> None:
    case = Problem(64, 3, 2, 16, 4, groups=2, queries_per_group=2, dim=8)
    inputs = tensors(case, precision(steps))
    found = torch.cat(of_ranks("mass", 2, case, steps, inputs, SCALE), -1)
    assert torch.equal(found, SCORERS["mass"](*inputs, pyramid_of(case), steps, None, None, SCALE))


def test_gla_on_chunks_that_are_not_whole_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    in_plain_pytorch(monkeypatch, segment=5, block=3)
    case = Problem(96, 3, 2, 8, 4, dim=8)
    inputs = tensors(case)
    expected = SCORERS["gla"](*inputs, pyramid_of(case), reference, None)
    assert_close(torch.cat(of_ranks("gla", 2, case, reference, inputs), -1), expected, "float64")


@both
@pytest.mark.parametrize("scorer", SCORERS)
def test_no_gradient(scorer: str, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    in_plain_pytorch(monkeypatch, segment=8, block=8)
    case = PROBLEMS["a head for each"]
    inputs = [x.requires_grad_() for x in tensors(case, "float32")]
    with torch.no_grad():
        scores = SCORERS[scorer](*inputs, pyramid_of(case), steps, None)
    assert not scores.requires_grad


def test_the_gate_is_fixed() -> None:
    weight = linear._weight(4096, torch.device("cpu"))
    assert 0.019 < weight.std() < 0.021
    assert weight.abs().max() < 0.1
    assert torch.equal(weight, linear._weight.__wrapped__(4096, torch.device("cpu")))
    first = [-0.009996545, 0.020611967, -0.003357224, -0.004757806]  # a model goes on training with those that it began with
    assert_close(linear._weight(4, torch.device("cpu")), first, "float32")


@pytest.mark.parametrize("scorer", ["dilated", "gla"])
def test_lengths_that_streams_do_not_divide_are_refused(scorer: str) -> None:
    assert SCORERS[scorer].problem(96, 1) is SCORERS[scorer].problem(96, 4) is None
    assert in_flags(str(SCORERS[scorer].problem(90, 1))) == (
        f"--seq-length 90 must be a multiple of 4 for --lighthouse-scorer {scorer}, which takes every 4th token: "
        "use --seq-length 88 or 92."
    )
    assert in_flags(str(SCORERS[scorer].problem(72, 4))) == (
        f"--seq-length 72 must be a multiple of 32 for --lighthouse-scorer {scorer}, which takes every 4th token of each of "
        "the 8 chunks of 4 context-parallel ranks: use --seq-length 64 or 96."
    )
    x, exchange = torch.zeros(12, 1, 1, 4), Exchange(None, Layout(2, 0))
    with pytest.raises(ValueError, match=r"query's N 24 must be a multiple of 16 .* use query's N 16 or 32"):
        SCORERS[scorer](x, x, x, Pyramid(12, 2, 2), reference, exchange)


@pytest.mark.parametrize("scorer", ["norm", "summary"])
def test_other_scorers_take_any_length(scorer: str) -> None:
    assert SCORERS[scorer].problem(90, 3) is None


@pytest.mark.parametrize(
    ("release", "is_old"), [("0.5.2", True), ("0.4.0", True), (None, True), ("0.6.0", False), ("1.0", False)]
)
def test_gla_on_a_gpu_asks_for_a_release(release: str | None, is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier ones break with Triton 3.8, or overflow 32 bits."""
    module = ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = lambda *given, **options: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(versions, "_installed", {"flash-linear-attention": release}.get)
    if is_old:
        with pytest.raises(
            ValueError, match=rf"gla .* is installed.*{release or 'which release'}.*flash-linear-attention>=0.6.0"
        ):
            SCORERS["gla"].check_installed(kernels, torch.device("cuda"))
    else:
        SCORERS["gla"].check_installed(kernels, torch.device("cuda"))


def test_gla_on_a_gpu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", None)
    with pytest.raises(ValueError, match=r"config.scorer gla .* pip install 'flash-linear-attention>=0.6.0'"):
        linear._flash_linear_attention()
    with pytest.raises(ValueError, match=r"config.scorer gla .* pip install 'flash-linear-attention>=0.6.0'"):
        SCORERS["gla"].check_installed(kernels, torch.device("cuda"))
    SCORERS["gla"].check_installed(reference, torch.device("cuda"))
    SCORERS["gla"].check_installed(kernels, torch.device("cpu"))
    SCORERS["norm"].check_installed(kernels, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gla_on_a_gpu_equals_plain_pytorch(dtype: str) -> None:
    pytest.importorskip("fla.ops.simple_gla", reason="flash-linear-attention is not installed")
    case = Problem(8192, 3, 4, 8, 4, batch=2, groups=2, queries_per_group=2, dim=64)
    inputs = tensors(case, dtype)
    expected = SCORERS["gla"](*(x.double() for x in inputs), pyramid_of(case), reference, None)
    assert_close(SCORERS["gla"](*inputs, pyramid_of(case), kernels, None), expected, dtype)


@pytest.mark.parametrize("scorer", SCORERS)
def test_whether_a_scorer_reads_the_values_is_what_it_says(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_plain_pytorch(monkeypatch, segment=8, block=8)
    case = PROBLEMS["a head for each"]
    query, key, value = tensors(case)
    one, other = (SCORERS[scorer](query, key, x, pyramid_of(case), reference, None) for x in (value, -2 * value))
    assert torch.equal(one, other) != SCORERS[scorer].reads_values


@pytest.mark.parametrize("scorer", SCORERS)
def test_whether_a_scorer_goes_by_length_is_what_it_says(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where queries and keys are all equally long, those that do find level 1 all alike."""
    in_plain_pytorch(monkeypatch, segment=8, block=8)
    case = PROBLEMS["grouped queries"]
    query, key, value = tensors(case)
    query, key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    finest = SCORERS[scorer](query, key, value, pyramid_of(case), reference, None)[..., : pyramid_of(case).entries(1)]
    assert bool(finest.std(-1).max() < 1e-9) == SCORERS[scorer].by_length


@pytest.mark.parametrize("scorer", SCORERS)
def test_how_a_scorer_grows_is_what_the_docs_say(scorer: str) -> None:
    (row,) = [line for line in (ROOT / "docs" / "usage.md").read_text().splitlines() if line.startswith(f"| `{scorer}` |")]
    assert row.split(" | ")[2] == SCORERS[scorer].grows
