"""The model beside every number that was measured, and beside the published ones."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lighthouse.plan import calibration, layer_time, memory, time
from megatron_lighthouse.plan.calibration import Point
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.layer_time import Setup
from megatron_lighthouse.plan.run import run_of
from megatron_lighthouse.variants import DENSE, LIGHTHOUSE

BOUNDS = {
    "one GPU": 0.15,
    "two GPUs (CP 2)": 0.20,
    "training step": 0.15,
    "training step, CP 2": 0.20,
    "training step, H200, eager": 0.10,
    "training step, H200, graphs": 0.15,
    "memory": memory.PROMISED,
}
"""Relative error that the plan promises, by group; the groups that are not here are only reported."""


@dataclass(frozen=True)
class Comparison:
    group: str
    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative: positive where the model says more than was measured."""
        return self.predicted / self.measured - 1


def compared(speed: Coefficients) -> list[Comparison]:
    """Every point of measured.csv, but for the authors' code."""
    return [
        Comparison(_group(p), f"{p.name} [{p.source}]", p.value, predicted(p, speed))
        for p in calibration.points()
        if p.what != "authors" and p.kind != "host"
    ]


def _group(p: Point) -> str:
    if p.kind == "h200":
        how = p.what.partition(", ")[2]
        return "training step, H200, " + (how if how in ("eager", "TP") else how.replace("whole ", ""))
    if p.kind == "run":
        step = "training step" + (f", CP {p.ranks}" if p.ranks > 1 else "")
        return "memory" if p.direction == "peak GiB" else step
    if p.kind == "scorer":
        return "a layer by its scorer"
    if p.ranks > 1:
        return f"two GPUs (CP {p.ranks})"
    if p.what in ("score", "select", "gather", "scatter"):
        return "single steps of a layer"
    return "one GPU" if p.plain and p.geometry.seq_length >= 16384 else "other shapes and below 16K"


def predicted(p: Point, speed: Coefficients) -> float:
    """What the model says of a measured point, in its unit."""
    device = calibration.DEVICE
    if p.kind in calibration.STEPS:
        run = calibration.measured_run(p)
        return memory.total(run) / 2**30 if p.direction == "peak GiB" else sum(time.step_parts(run, speed).values())
    what, _, scheme = p.what.partition(" ")
    setup = Setup(p.layer, device, speed, p.ranks, scheme or "p2p", p.ranks)
    if what == "dense":
        return layer_time.dense_layer(p.rows, setup)[p.direction]
    if what == "inner":
        which = p.direction == "fwd+bwd"
        plain = layer_time.attention_seconds("inner", p.rows, setup)
        more = layer_time.crossing_seconds(p.rows, setup, plain, DENSE.sent)
        return plain[which] + more[which]
    layer = layer_time.lighthouse_layer(p.geometry, setup, p.what if p.kind == "scorer" else "norm")
    if p.kind == "scorer":
        return layer[p.direction]
    return layer[p.direction] if what == "lighthouse" else layer[what + (" bwd" if p.direction == "bwd" else "")]


def authors_over_dense() -> float:
    """How many times as fast as dense cuDNN the authors' layer was on the H100 at 491,520 tokens, forward."""
    found = {
        p.what: p.value
        for p in calibration.points()
        if p.geometry.seq_length == 491520 and (p.direction, p.ranks) == ("fwd", 1)
    }
    return found["dense"] / found["authors"]


def published(speed: Coefficients) -> list[Comparison]:
    """The paper's figures beside the model's, on one B200: extrapolated."""
    given, device = calibration.given(), DEVICES["b200"]
    point = next(p for p in calibration.points() if p.what == "lighthouse" and p.plain and p.geometry.seq_length == 524288)
    setup = Setup(point.layer, device, speed)
    dense, ours = layer_time.dense_layer(524288, setup), layer_time.lighthouse_layer(point.geometry, setup)
    inner = layer_time.attention_seconds("inner", point.rows, setup)
    rows = []
    for direction, label in (("fwd", "forward"), ("fwd+bwd", "forward+backward")):
        start, slope = speed.authors[direction]
        around = start + slope * calibration.authors_bytes(point, direction) / device.memory_bytes_s
        theirs = inner[direction == "fwd+bwd"] + around
        figure, title = given[f"published {label}"], f"512K, {label}, times dense cuDNN"
        rows.append(Comparison("published", f"{title}: our kernels", figure, dense[direction] / ours[direction]))
        rows.append(Comparison("published", f"{title}: the authors' code", figure, dense[direction] / theirs))
    run = run_of("530m-98k", device=device, gpus=1, global_batch=1)
    rates = {name: time.tokens_per_gpu(run.change(attention=name), speed) for name in (DENSE.name, LIGHTHOUSE.name)}
    stage, plain = given["published stage-1"], given["published dense"]
    rows.append(Comparison("published", "98K, 530M, dense, tokens/s/GPU", plain, rates["dense"]))
    rows.append(Comparison("published", "98K, 530M, stage 1, tokens/s/GPU: our kernels", stage, rates["lighthouse"]))
    alone = time.tokens_per_gpu(run, speed.without_host())
    rows.append(Comparison("published", "98K, 530M, stage 1, tokens/s/GPU: our kernels, GPU alone", stage, alone))
    rows.append(Comparison("published", "98K, 530M, stage 1 over dense", stage / plain, rates["lighthouse"] / rates["dense"]))
    return rows
