"""The step's two clocks, GPU and host: which of them a layer waits for, and how well that is fitted."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lighthouse.plan import accuracy, calibration, report, search, time
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.run import RECOMPUTE, Run, recipes, run_of

ROOT = Path(__file__).parents[2]
SPEED = coefficients()
ALONE = SPEED.without_host()
STEPS = [p for p in calibration.points() if (p.kind, p.direction) == ("run", "seconds")]
H200 = [p for p in calibration.points() if p.kind == "h200"]
STUDY = [calibration.measured_run(p) for p in STEPS]
RUNS = [*STUDY, *(run_of(name, recompute=again) for name in recipes() for again in RECOMPUTE)]


def step(run: Run) -> float:
    return sum(time.step_parts(run, SPEED).values())


def study(tokens: int, ranks: int, attention: str) -> Run:
    """That point of the scaling study."""
    return next(r for r in STUDY if (r.seq_length, r.context_parallel, r.attention) == (tokens, ranks, attention))


def test_never_below_gpu_or_host() -> None:
    for run in RUNS:
        gpu, host = sum(time.step_parts(run, ALONE).values()), time.host_seconds(run, SPEED)
        assert max(gpu, host) <= step(run) <= gpu + host * run.pipeline_parallel


def test_only_the_host_differs() -> None:
    """What the GPU does takes as long as without the host; a bubble and gradients that hide may change with the step."""
    for run in STUDY:
        ours, alone = time.step_parts(run, SPEED), time.step_parts(run, ALONE)
        assert alone["host, exposed"] == 0 <= ours["host, exposed"]
        assert {n: x for n, x in ours.items() if n != "host, exposed"} == {
            n: x for n, x in alone.items() if n != "host, exposed"
        }


def test_each_kind_of_layer_waits_for_itself() -> None:
    """At 98,304 tokens over two ranks Lighthouse layers wait for the host and dense ones do not; the sums would not show it."""
    run = study(98304, 2, "lighthouse")
    assert time.step_parts(study(98304, 2, "dense"), SPEED)["host, exposed"] == 0
    alone = time.step_parts(run.change(model=replace(run.model, dense_first=0, dense_last=0)), ALONE)
    layer = sum(value for name, value in alone.items() if name not in ("logits and loss", "optimizer")) / 30
    waits = 26 * (time.layer_host_seconds(run, SPEED)[1] - layer)
    assert time.step_parts(run, SPEED)["host, exposed"] == pytest.approx(waits)
    assert waits > 0
    assert time.host_seconds(run, SPEED) < sum(time.step_parts(run, ALONE).values())


@pytest.mark.parametrize("attention", ["dense", "lighthouse"])
def test_which_points_are_the_hosts(attention: str) -> None:
    short, long = study(32768, 2, attention), study(262144, 2, attention)
    assert time.step_parts(short, SPEED)["host, exposed"] > 0.25 * step(short)
    assert time.step_parts(long, SPEED)["host, exposed"] == 0


def test_parallelism_takes_the_host_longer() -> None:
    one, tensor, context = (
        time.layer_host_seconds(run_of("530m-98k", gpus=2, tensor_parallel=t, context_parallel=c), SPEED)
        for t, c in ((1, 1), (2, 1), (1, 2))
    )
    assert one < tensor == context  # each of two kinds of layer


def test_recompute_takes_the_host_longer() -> None:
    times = [time.layer_host_seconds(run_of("530m-98k", recompute=again), SPEED) for again in RECOMPUTE]
    assert times == sorted(set(times))


def test_every_device_has_one_of_two_hosts() -> None:
    hosts = {name: time.host_seconds(run_of("530m-98k", device=d), SPEED) for name, d in DEVICES.items()}
    assert hosts["h200"] < hosts["h100"] == hosts["b200"] == hosts["gb200"]


def test_on_an_h200_a_layer_takes_its_own_host() -> None:
    """Dense layers wait for Transformer Engine's ring, Lighthouse's copy; other schemes cost more as on the H100's."""

    def host(scheme: str, tensor: int = 1) -> tuple[float, float]:
        context = 2 // tensor if scheme else 1
        one = run_of("530m-98k", device=DEVICES["h200"], gpus=2, context_parallel=context, tensor_parallel=tensor)
        return time.layer_host_seconds(one.change(cp_comm_type=scheme or "p2p", recompute="none"), SPEED)

    dense, ours = host("p2p")
    assert ours < host("")[0] == host("")[1] < dense
    more = SPEED.host["all_gather"] - SPEED.host["p2p"]
    assert host("all_gather") == pytest.approx([dense + more] * 2)
    assert host("", tensor=2) == pytest.approx([dense] * 2)  # what Transformer Engine's ring costs


@pytest.mark.parametrize(("attention", "ranks"), [("lighthouse", 1), ("dense", 2), ("lighthouse", 2)])
def test_the_shortest_eager_steps_of_h200s_say_it(attention: str, ranks: int) -> None:
    own = [p for p in H200 if (p.what, p.ranks) == (f"{attention}, eager", ranks)]
    shortest = min(own, key=lambda p: p.value)
    assert accuracy.predicted(shortest, SPEED) == pytest.approx(shortest.value, rel=1e-4)
    assert accuracy.predicted(shortest, ALONE) < 0.9 * shortest.value


def test_under_graphs_nothing_waits_for_the_host() -> None:
    graphed = [p for p in H200 if "graphs" in p.what]
    assert len(graphed) == 11
    for p in graphed:
        run = calibration.measured_run(p)
        assert time.host_seconds(run, SPEED) == 0
        assert time.step_parts(run, SPEED) == time.step_parts(run.change(options={}), ALONE)
        assert report.host_lines(run, SPEED).startswith("host: the GPU does not wait for it within CUDA graphs")


def test_what_graphs_hold_is_said_as_it_was_measured() -> None:
    (graphed, *_) = (calibration.measured_run(p) for p in H200 if "graphs" in p.what)
    assert "CUDA graphs hold more, which is not counted: 8% of all" in report.memory_table(graphed)
    assert "graphs" not in report.memory_table(graphed.change(options={}))
    with (ROOT / "benchmarks/results/training_step/h200_graphs/steps.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row["graphs"].startswith("full_iteration")]
    assert len(found) == 4
    for row in found:
        more = float(row["held GiB with graphs"]) / float(row["held GiB"]) - 1
        assert more == pytest.approx(report.GRAPHS_HOLD, abs=0.005)


def test_no_other_fit_is_better() -> None:
    """The fit goes by slopes; a grid around it and far from it finds no less error."""

    def error(elementwise: float, layer_host: float) -> float:
        speed = replace(SPEED, elementwise=elementwise, layer_host=layer_host)
        return sum((accuracy.predicted(p, speed) / p.value - 1) ** 2 for p in STEPS)

    factors = (0.0, 0.5, 0.9, 0.99, 1.01, 1.1, 1.5, 2.5)
    least = error(SPEED.elementwise, SPEED.layer_host)
    assert all(least < error(SPEED.elementwise * a, SPEED.layer_host * b) for a, b in itertools.product(factors, factors))


def test_two_gpus_follow_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted without any training step of two GPUs, the model foretells those within what is promised of them."""
    one = tuple(p for p in calibration.points() if p.kind != "run" or p.ranks == 1)
    monkeypatch.setattr(calibration, "points", lambda: one)
    speed = calibration._training(SPEED)
    assert speed.layer_host != SPEED.layer_host
    for p in STEPS:
        assert abs(accuracy.predicted(p, speed) / p.value - 1) < accuracy.BOUNDS["training step, CP 2"], p.name


def test_report_says_whose_host() -> None:
    assert "as on the slow host of the H100 points\nby the GPU alone" in report.host_lines(study(32768, 2, "dense"), SPEED)
    assert "the GPU does not wait for it" in report.host_lines(study(262144, 2, "dense"), SPEED)
    wide = report.host_lines(run_of("530m-256k-cp8"), SPEED)
    assert "[its own was not measured; more than two context-parallel ranks are taken as two]" in wide


def test_ranking_is_by_the_whole_step() -> None:
    """Where the host decides, the order differs from that of the GPU alone, and the report says so."""
    run = run_of("530m-256k-cp8", device=DEVICES["b200"], gpus=8)
    ours, alone = (search.rank(run, speed).layouts[0] for speed in (SPEED, ALONE))
    assert ours[0] != alone[0]
    assert ours[1] < alone[1]
    assert f"by the GPU alone the first would be {report.layout(alone[0])}" in report.ranking(
        run, search.rank(run, SPEED), SPEED
    )


def test_the_docs_say_what_h200s_say() -> None:
    """The host's numbers, and the rows of errors, in docs/plan.md."""
    page = (ROOT / "docs/plan.md").read_text()
    of = {name: f"{1e3 * seconds:.1f}" for name, seconds in SPEED.h200_host.items()}
    assert f"{of['lighthouse', '']} ms on one GPU |\n" in page
    assert f"| {of['lighthouse', 'p2p']} ms, a dense layer {of['dense', 'p2p']} |" in page
    found: dict[str, list[float]] = {}
    for p in accuracy.compared(SPEED):
        if "H200" in p.group:
            found.setdefault("TP" if "TP" in p.group else p.group.rpartition(", ")[2], []).append(abs(p.error))
    for kind, start in (
        ("eager", "| iteration on one and two H200s, eager, "),
        ("graphs", "| … under graphs "),
        ("TP", "| … by TP 2, "),
    ):
        row = next(line for line in page.splitlines() if line.startswith(start) and line.count("|") == 6)
        errors = found[kind]
        assert f"| {len(errors)} | {max(errors):.1%} | {sum(errors) / len(errors):.1%} |" in row
