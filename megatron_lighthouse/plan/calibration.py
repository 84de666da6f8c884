"""Fits `Coefficients` to measured.csv and given.csv, which ship with the package. No number is typed here."""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import numpy

from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.geometry import Geometry, Shape
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.sharded.sent import attend_bytes
from megatron_lighthouse.plan import layer_time, time, work
from megatron_lighthouse.plan.coefficients import Coefficients, Fit
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.layer_time import Setup
from megatron_lighthouse.plan.run import Run, run_of
from megatron_lighthouse.sequence.layout import Layout

DEVICE = DEVICES["h100"]
"""Where everything was measured, but for what `STEPS` says."""
STEPS = {"run": DEVICE, "h200": DEVICES["h200"]}
"""Kinds of points that are training steps, and where these were measured."""
MEASURED_VOCAB = 384
"""Rows of the embedding in the measured training steps: plain text, one byte a token (docs/usage.md)."""
ROUNDS, SMALL = 3, 1e-6
"""How often `_training` fits (once is enough for these points), and by what it moves a coefficient to see its slope."""


@dataclass(frozen=True)
class Point:
    """One measured number."""

    kind: str
    source: str
    what: str
    direction: str
    geometry: Geometry
    layer: Shape
    ranks: int
    value: float
    """Seconds; GiB where the direction is 'peak GiB'."""

    @property
    def rows(self) -> int:
        """Rows that the attention in it attends to."""
        return self.geometry.seq_length if self.what.split()[0] == "dense" else self.geometry.gathered_length

    @property
    def plain(self) -> bool:
        """Of the shape that the paper measures: B=1, H=G=8, D=128."""
        return (self.layer.batch, self.layer.heads, self.layer.groups, self.layer.dim) == (1, 8, 8, 128)

    @property
    def name(self) -> str:
        n, g, l = self.geometry.seq_length, self.geometry, self.layer
        shape = "" if self.plain or self.kind in STEPS else f" B={l.batch} H={l.heads} G={l.groups} D={l.dim}"
        ranks = "TP" if "TP" in self.what else "CP"
        return f"{self.what}, {self.direction}, N={n} L={g.levels} p={g.pooling} k={g.budget}{shape} {ranks}={self.ranks}"


@cache
def points() -> tuple[Point, ...]:
    """All of measured.csv."""
    lines = (files("megatron_lighthouse.plan") / "measured.csv").read_text().splitlines()
    return tuple(_point(row) for row in csv.DictReader(line for line in lines if not line.startswith("#")))


def _point(row: dict[str, str]) -> Point:
    config = LighthouseConfig(int(row["levels"]), int(row["pooling"]), int(row["budget"]))
    geometry = config.geometry(int(row["tokens"]), int(row["ranks"]))
    batch, heads, groups, dim = (int(row[key] or 0) for key in ("batch", "heads", "groups", "dim"))
    layer = Shape(batch, heads, groups, dim, 2)
    value = float(row["value"]) * (1 if row["kind"] in STEPS else 1e-3)
    return Point(row["kind"], row["source"], row["what"], row["direction"], geometry, layer, int(row["ranks"]), value)


@cache
def given() -> dict[str, float]:
    """given.csv: ceilings of one H100, and published figures."""
    text = (files("megatron_lighthouse.plan") / "given.csv").read_text().splitlines()
    return {row["name"]: float(row["value"]) for row in csv.DictReader(text)}


@cache
def coefficients() -> Coefficients:
    """The fit."""
    speed = Coefficients(
        {}, {}, (), {}, _host(), 1.0, DEVICE.flops / given()["matmul"], 0.0, DEVICE.nvlink_bytes_s / given()["link"]
    )
    for kind in ("dense", "inner"):
        for direction, factor in (("fwd", 1.0), ("fwd+bwd", work.FORWARD_AND_BACKWARD)):
            found = _layers(kind, direction)
            speed.attention[kind, direction] = fit(
                [[1.0, work.attention_flops(p.rows, p.layer) * factor / DEVICE.flops] for p in found], [p.value for p in found]
            )
    for step, direction in work.STEPS:
        found = _layers(step, direction)
        moved = [work.step_bytes(step, p.geometry.seq_length, p.geometry.gathered_length, p.layer) for p in found]
        speed.steps[step, direction] = fit([[1.0, x / DEVICE.memory_bytes_s] for x in moved], [p.value for p in found])
    found = _layers("select", "fwd")
    features = [work.select_features(p.geometry, p.layer, 1, DEVICE.multiprocessors) for p in found]
    copy = speed.steps["gather", "fwd"][1]
    speed = replace(speed, copy=copy, select=fit(features, [p.value for p in found]))
    speed = replace(speed, scorer=_scorer(speed))
    for scheme in COMM_TYPES:
        for direction in ("fwd", "fwd+bwd"):
            speed.ranks[scheme, direction] = _crossing(scheme, direction, speed)
    for direction in ("fwd", "fwd+bwd"):
        speed.authors[direction] = _authors(direction, speed)
    speed = _training(speed)
    return replace(speed, h200_host=_h200_host(speed))


def _host() -> dict[str, float]:
    """Medians over lengths, of one rank and of two by each scheme."""
    found: dict[str, list[float]] = {}
    for p in points():
        if p.kind == "host" and p.plain:
            found.setdefault(p.what.partition(" ")[2], []).append(p.value)
    return {scheme: statistics.median(values) for scheme, values in found.items()}


def _layers(what: str, direction: str) -> list[Point]:
    """Layer points of one rank of head dimension 128 and at least 16K tokens: what is fitted."""
    return [
        p
        for p in points()
        if (p.kind, p.what, p.direction, p.ranks) == ("layer", what, direction, 1)
        and p.layer.dim == 128
        and p.geometry.seq_length >= 16384
    ]


def _scorer(speed: Coefficients) -> float:
    """Times over operations, from what layers of other scorers take beyond that of `norm`."""
    found = [p for p in points() if p.kind == "scorer"]
    base = {p.geometry.seq_length: p.value for p in found if p.what == "norm"}
    own = [(p, SCORERS[p.what]) for p in found if p.what != "norm"]
    norm, each = SCORERS["norm"], speed.steps["score", "fwd"][1] / DEVICE.memory_bytes_s
    known = [(s.moved(p.geometry, p.layer) - norm.moved(p.geometry, p.layer)) * each for p, s in own]
    features = [[s.flops(p.geometry, p.layer) / DEVICE.flops] for p, s in own]
    return fit(features, [p.value - base[p.geometry.seq_length] for p, _ in own], known)[0]


def _crossing(scheme: str, direction: str, speed: Coefficients) -> Fit:
    """(seconds for each other rank, 0, times over bytes): from the inner attention alone on two ranks."""
    found = [p for p in points() if p.what == f"inner {scheme}" and p.direction == direction]
    which = direction == "fwd+bwd"
    known, features = [], []
    for p in found:
        known.append(layer_time.attention_seconds("inner", p.rows, Setup(p.layer, DEVICE, speed, p.ranks))[which])
        forward, backward = attend_bytes(scheme, p.rows, p.layer, Layout(p.ranks, p.ranks - 1))
        travel = (forward + which * backward) / DEVICE.nvlink_bytes_s * speed.link
        features.append([p.ranks - 1.0, 0.0 if scheme == "p2p" else travel])
    each, slope = fit(features, [p.value for p in found], known)
    return each, 0.0, slope


def _authors(direction: str, speed: Coefficients) -> Fit:
    """Times over the bytes of the steps, from what the authors' layer takes beyond the inner attention."""
    found = _layers("authors", direction)
    inner = [layer_time.attention_seconds("inner", p.rows, Setup(p.layer, DEVICE, speed)) for p in found]
    known = [seconds[direction == "fwd+bwd"] for seconds in inner]
    return fit([[1.0, authors_bytes(p, direction) / DEVICE.memory_bytes_s] for p in found], [p.value for p in found], known)


def authors_bytes(point: Point, direction: str) -> float:
    """Bytes of the steps around the inner attention, in that direction."""
    steps = [step for step, way in work.STEPS if way == "fwd" or direction == "fwd+bwd"]
    return sum(work.step_bytes(step, point.geometry.seq_length, point.geometry.gathered_length, point.layer) for step in steps)


def _training(speed: Coefficients) -> Coefficients:
    """With `elementwise` and `layer_host` from the training steps.

    A step is linear in both as long as the same layers wait for the host: fit, see which do by that, and fit again.
    """
    found = [p for p in points() if (p.kind, p.direction) == ("run", "seconds")]
    runs, values = [measured_run(p) for p in found], [p.value for p in found]
    most = min(value / run.model.layers for value, run in zip(values, runs, strict=True))  # all of the shortest step
    elementwise, layer_host = speed.elementwise, most

    def step(run: Run, elementwise: float, layer_host: float) -> float:
        return sum(time.step_parts(run, replace(speed, elementwise=elementwise, layer_host=layer_host)).values())

    for _ in range(ROUNDS):
        known, features = [], []
        for run in runs:
            base = step(run, elementwise, layer_host)
            slopes = [
                (step(run, elementwise + SMALL, layer_host) - base) / SMALL,
                (step(run, elementwise, layer_host + SMALL) - base) / SMALL,
            ]
            features.append(slopes)
            known.append(base - slopes[0] * elementwise - slopes[1] * layer_host)
        elementwise, layer_host = fit(features, values, known)
    return replace(speed, elementwise=elementwise, layer_host=layer_host)


def _h200_host(speed: Coefficients) -> dict[tuple[str, str], float]:
    """What an H200's host takes for a layer: that by which the shortest eager step takes as long as measured.

    On one rank that is a Lighthouse step, for no dense one waited for the host; dense layers are taken to need as much there.
    """
    found: dict[tuple[str, str], float] = {}
    for attention, ranks, scheme, of in (
        ("lighthouse", 1, "", ("lighthouse", "dense")),
        ("dense", 2, "p2p", ("dense",)),
        ("lighthouse", 2, "p2p", ("lighthouse",)),
    ):
        eager = [p for p in points() if (p.kind, p.what, p.ranks) == ("h200", f"{attention}, eager", ranks)]
        shortest = min(eager, key=lambda p: p.value)
        run = measured_run(shortest)
        host = shortest.value / run.model.layers
        for _ in range(ROUNDS):  # a step is linear in it as long as the same layers wait
            known = [{**found, **dict.fromkeys(((one, scheme) for one in of), value)} for value in (host, host + SMALL)]
            base, more = (sum(time.step_parts(run, replace(speed, h200_host=one)).values()) for one in known)
            host += (shortest.value - base) / (more - base) * SMALL
        found |= dict.fromkeys(((one, scheme) for one in of), host)
    return found


def measured_run(point: Point) -> Run:
    """The run of a training step that was measured."""
    g, what = point.geometry, point.what
    tensor = point.ranks if "TP" in what else 1
    run = run_of(
        "530m-98k",
        device=STEPS[point.kind],
        attention="dense" if what.startswith("dense") else "lighthouse",
        seq_length=g.seq_length,
        config=LighthouseConfig(g.levels, g.pooling, g.budget),
        gpus=point.ranks,
        tensor_parallel=tensor,
        context_parallel=point.ranks // tensor,
        global_batch=1,
        recompute="full" if "recompute full" in what else "none",
        discard_output="outputs kept" not in what,
        options={"cuda_graph_impl": "full_iteration" if "whole" in what else "local"} if "graphs" in what else {},
    )
    model = replace(run.model, dense_first=0, dense_last=0) if "all layers" in what else run.model
    return run.change(model=replace(model, vocab=MEASURED_VOCAB))


def fit(features: list[list[float]], values: list[float], known: list[float] | None = None) -> Fit:
    """Non-negative coefficients c of least relative error of known + features·c against the values."""
    y = numpy.array(values)
    x = numpy.array(features) / y[:, None]
    target = 1 - (numpy.array(known) if known else numpy.zeros_like(y)) / y
    kept = list(range(x.shape[1]))
    while kept:  # leave out what would be negative, the most negative first
        solution = numpy.linalg.lstsq(x[:, kept], target, rcond=None)[0]
        if solution.min() >= 0:
            break
        kept.pop(int(solution.argmin()))
    full = numpy.zeros(x.shape[1])
    if kept:
        full[kept] = solution
    return tuple(float(c) for c in full)
