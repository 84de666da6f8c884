"""The plan's model, memory and times, held to hand formulas and to what was measured."""

from __future__ import annotations

import pytest

from megatron_lighthouse.plan import accuracy, copy_measured, memory, report, time
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES, device_of
from megatron_lighthouse.plan.run import recipes, run_of

POINTS = accuracy.compared(coefficients())
PUBLISHED = {
    "512K, forward, times dense cuDNN: our kernels": (2.0, 3.5),
    "512K, forward, times dense cuDNN: the authors' code": (1.6, 2.6),
    "512K, forward+backward, times dense cuDNN: our kernels": (2.5, 4.5),
    "512K, forward+backward, times dense cuDNN: the authors' code": (2.2, 4.0),
    "98K, 530M, dense, tokens/s/GPU": (0.85, 1.15),
    "98K, 530M, stage 1, tokens/s/GPU: our kernels": (1.0, 1.6),
    "98K, 530M, stage 1, tokens/s/GPU: our kernels, GPU alone": (1.0, 1.6),
    "98K, 530M, stage 1 over dense": (1.0, 1.45),
}
"""Model over paper, as docs/plan.md says: the paper's own ratios do not follow from an H100's by datasheet."""


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        # 2 * vocab * h + layers * (qkv + projection + three MLP matrices + two norms) + the last norm
        ("530m-98k", 2 * 128256 * 1024 + 30 * (1024 * 3072 + 1024 * 1024 + 3 * 1024 * 1536 + 2 * 1024) + 1024),
        ("llama3-8b-512k", 8_030_261_248),  # as Meta's checkpoint has
    ],
)
def test_parameters(recipe: str, expected: int) -> None:
    run = run_of(recipe, gpus=1, tensor_parallel=1, context_parallel=1, pipeline_parallel=1, global_batch=1)
    assert run.model.parameters == expected
    assert time.rank_parameters(run) == expected


@pytest.mark.parametrize("group", accuracy.BOUNDS)
def test_within_what_is_promised(group: str) -> None:
    own = [p for p in POINTS if p.group == group]
    assert own
    assert [p.name for p in own if abs(p.error) > accuracy.BOUNDS[group]] == []


def test_no_point_is_lost() -> None:
    """Every measured layer of at least 16K tokens of the paper's shape, in csv as committed, is in the promised group."""
    assert sum(p.group == "one GPU" for p in POINTS) >= 15 * 6
    assert sum(p.group == "two GPUs (CP 2)" for p in POINTS) == 2 * (3 * 7 + 3)
    # five of training_step, the scaling study's twelve and its one with all layers Lighthouse
    assert sum(p.group == "memory" for p in POINTS) == 5 + 13
    assert sum(p.group == "training step" for p in POINTS) == 5 + 7
    assert sum(p.group == "training step, CP 2" for p in POINTS) == 6


def test_measured_is_what_the_benchmarks_left() -> None:
    assert copy_measured.TARGET.read_text() == copy_measured.collected()


def test_published_points_deviate_as_documented() -> None:
    found = {p.name: p.predicted / p.measured for p in accuracy.published(coefficients())}
    assert found.keys() == PUBLISHED.keys()
    for name, (low, high) in PUBLISHED.items():
        assert low < found[name] < high, (name, found[name])


def test_kept_by_one_layer() -> None:
    """The bytes that benchmarks/attention.py found kept for backward at 98,304 tokens: 155,713,552 of Lighthouse."""
    run = run_of("530m-98k", gpus=1, global_batch=1)
    dense, ours = memory.dense_activations(run), memory.lighthouse_activations(run)
    outside = 98304 * 2 * (4 * 1024 + 3 * 1536)
    assert ours - outside == pytest.approx(155_713_552, rel=1e-3)
    # Q, K, V and log-sum-exp as measured, and the output, which the projection keeps too
    assert dense - outside == pytest.approx(607_125_520 + 98304 * 1024 * 2, rel=1e-3)
    kept = memory.lighthouse_activations(run.change(discard_output=False))
    assert kept - ours == 98304 * 1024 * 2


def test_ring_in_backward() -> None:
    """Sixteen rows of 1024 bf16 a token, where there is more than one rank: the residual's gradient, the output's, two of Q and
    one in fp32, K's and V's, and twice K, V and their gradients. By then the MLP's 3 FFN and its norm's 2 rows are gone."""
    name = "backward of its attention, beyond that"
    run = run_of("530m-98k", gpus=2, context_parallel=2, attention="dense")
    ring = 98304 // 2 * 2 * (1024 * (1 + 1 + 2 + 2 + 2 + 8 - 2) - 3 * 1536)
    mlp = 98304 // 2 * 2 * (1024 + 3 * 1536)
    assert memory.parts(run)[name] == ring - mlp > 0
    assert memory.parts(run.change(context_parallel=1))[name] == 0


def test_optimizer_is_shared_among_data_and_context_ranks() -> None:
    one = memory.parts(run_of("530m-98k", gpus=1, global_batch=1))
    name = "optimizer (fp32 master, two moments)"
    assert one[name] == 12 * run_of("530m-98k").model.parameters
    assert memory.parts(run_of("530m-98k"))[name] == pytest.approx(one[name] / 8)
    assert memory.parts(run_of("530m-256k-cp8"))[name] == pytest.approx(one[name] / 8)


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_accepted_and_fit_a_b200(name: str) -> None:
    run = run_of(name, device=device_of("b200")).check()
    assert memory.fits(run), memory.parts(run)


@pytest.mark.parametrize(
    ("device", "gpus", "links"),
    [("gb200", 64, ("NVLink", "NVLink")), ("gb200", 128, ("network", "NVLink")), ("b200", 64, ("network", "network"))],
)
def test_pipeline_stages_lie_apart(device: str, gpus: int, links: tuple[str, str]) -> None:
    """By Megatron's order some neighbours in the pipeline lie in other domains; gradients stay within a stage."""
    rows = report.link_table(run_of("llama3-8b-512k", device=device_of(device), gpus=gpus)).splitlines()
    assert tuple(row.split()[-1] for name in ("pipeline", "data parallel") for row in rows if row.startswith(name)) == links


def test_faster_device_is_faster() -> None:
    speed = coefficients()
    rates = [time.tokens_per_gpu(run_of("530m-98k", device=d), speed) for d in DEVICES.values()]
    assert rates == sorted(rates)


def test_recompute_costs_time_and_saves_memory() -> None:
    runs = [run_of("530m-98k", recompute=r) for r in ("none", "mlp", "full")]
    times = [sum(time.step_parts(run, coefficients()).values()) for run in runs]
    assert times == sorted(times)
    assert memory.total(runs[0]) > memory.total(runs[1]) > memory.total(runs[2])
