"""What the docs say of a Qwen3-like model, from its results."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean

import pytest

from experiments import archive
from experiments.pairs import positions
from experiments.tables import Results, Row
from tests.experiments.kept import RESULTS, kept, missing_in_docs

PAGE = "../experiments/qwen3.md"
SEEDS = ("", "-2")
LIGHTHOUSE = ("mass", "mass-2", "warm", "warm-2")
WARMUP, SWITCH, STEPS = 750, 1800, 3000


type Losses = dict[str, dict[int, float]]


@pytest.fixture(scope="module")
def results() -> Results:
    return archive.read(RESULTS / "qwen3-3000" / "work.tgz")


@pytest.fixture(scope="module")
def losses(results: Results) -> Losses:
    """Training losses of each run, by iteration."""
    return {run: results.losses(run) for run in results.facts["runs"]}


def dense_of(run: str) -> str:
    return f"dense{'-2' if run.endswith('-2') else ''}"


def mean(losses: Losses, run: str, first: int, last: int) -> float:
    return fmean(losses[run][i] for i in range(first, last + 1))


def above(losses: Losses, run: str, first: int, last: int) -> float:
    """The mean distance from dense of some iterations."""
    return mean(losses, run, first, last) - mean(losses, dense_of(run), first, last)


def below(losses: Losses, run: str, level: float, after: int = 0) -> int:
    """The middle of the first 51 iterations, all of them later than `after`, whose mean loss is below a level."""
    return next(i for i in range(after + 26, STEPS - 25) if mean(losses, run, i - 25, i + 25) < level)


def of(pair: Row, form: str, what: str = "") -> str:
    names = (f"{what}_accuracy_difference", f"{what}_accuracy_error") if what else ("difference", "standard_error")
    return " ± ".join((f"{pair[names[0]]:{form}}", f"{pair[names[1]]:{form.lstrip('+')}}"))


def test_1500_iterations() -> None:
    """Held-out losses and passkeys, less those of the dense run with the same seed; on both pages."""
    losses = {row["run"]: row["held_out_loss"] for row in kept("qwen3", "runs")}
    rows, judged = [f"| `{run}` | {losses[run]:.4f} | | |" for run in ("dense", "dense-2")], []
    for pair in kept("qwen3", "pairs"):
        if pair["against"] == dense_of(pair["run"]) and not pair["run"].startswith("dense"):
            rows.append(f"| `{pair['run']}` | {losses[pair['run']]:.4f} | {of(pair, '+.4f')} | {of(pair, '+.1%', 'noise')} |")
            judged += [pair] if pair["run"].startswith("mass") else []
    rows.append(f"It ends {sum(pair['difference'] for pair in judged) / 2:.3f} above, in the mean of two seeds")
    assert len(rows) == 7
    assert not missing_in_docs(rows, PAGE)
    both = " | ".join(of(pair, "+.4f") for pair in judged)
    assert not missing_in_docs([f"`mass`: loss | `qwen3`, 16K, 49 MB | {both} |"], "quality.md")


def test_3000_iterations() -> None:
    """Losses and passkeys of both kinds, with a dense warm-up and without; on both pages."""
    runs, shorter = ({row["run"]: row for row in kept(name, "runs")} for name in ("qwen3-3000", "qwen3"))
    pairs_of = {(row["run"], row["against"]): row for row in kept("qwen3-3000", "pairs")}
    judged = {run: pairs_of[run, dense_of(run)] for run in LIGHTHOUSE}
    kinds = ("noise", "classic")
    rows = []
    for seed in SEEDS:
        dense = runs[f"dense{seed}"]
        found = " | ".join(f"{dense[f'{kind}_accuracy']:.1%}" for kind in kinds)
        rows.append(f"| `dense{seed}` | {dense['held_out_loss']:.4f} | | {found} |")
    for run, pair in judged.items():
        right = " | ".join(f"{runs[run][f'{kind}_accuracy']:.1%} ({of(pair, '+.1%', kind)})" for kind in kinds)
        rows.append(f"| `{run}` | {runs[run]['held_out_loss']:.4f} | {of(pair, '+.4f')} | {right} |")
    means = [sum(judged[f"{run}{seed}"]["difference"] for seed in SEEDS) / 2 for run in ("mass", "warm")]
    rows.append("`mass` ends {:.3f} above dense, in the mean of two seeds, `warm` {:.3f}".format(*means))
    rows.append(f"ends {means[0] - means[1]:.4f} lower**")
    gains = [-pairs_of[f"warm{seed}", f"mass{seed}"]["difference"] for seed in SEEDS]
    rows.append("by {:.4f} and {:.4f}".format(*gains))
    speeds = [[runs[f"warm{seed}"][f"tokens_per_second_{stage}"] for seed in SEEDS] for stage in ("dense", "lighthouse")]
    rows.append("took {:.2f} and {:.2f} of one of its dense ones".format(*(a / b for a, b in zip(*speeds, strict=True))))
    apart = pairs_of["dense-2", "dense"]
    rows.append(f"those end {-apart['difference']:.4f} apart")
    rows.append(f"the dense seeds lie {apart['noise_accuracy_difference'] * 100:.1f} points apart")
    assert all(pair["iterations_to_catch_up"] is None for pair in judged.values())
    assert all(pair["classic_accuracy_difference"] < 0 for pair in judged.values())
    before, now = ({run: f"{row['classic_accuracy'] * 100:.1f}" for run, row in of.items()} for of in (shorter, runs))
    rows.append(f"from {before['dense']} and {before['dense-2']}% to {now['dense']} and {now['dense-2']}%")
    rows += [f"from {before[run]} to {now[run]}%" for run in ("mass", "mass-2")]
    assert not missing_in_docs(rows, PAGE)
    short = []
    for title, name in (("for 3,000 iterations", "mass"), ("after a dense warm-up", "warm")):
        both = [judged[f"{name}{seed}"] for seed in SEEDS]
        study = "`qwen3-3000`, 98 MB" if name == "mass" else ""
        short.append(f"| … {title}: loss | {study} | ".replace("|  |", "| |") + " | ".join(of(pair, "+.4f") for pair in both))
        for words, kind in (("passkey", "noise"), ("classic passkey", "classic")):
            short.append(f"| … {words} | | {' | '.join(of(pair, '+.1%', kind) for pair in both)} |")
    short.append("ends {:.3f} above dense, in the mean of two seeds, and {:.3f} after a dense warm-up".format(*means))
    assert not missing_in_docs(short, "quality.md")


def test_the_distance_from_dense_before_and_after_the_switch(losses: Losses) -> None:
    """Means of training losses: the table, what the switch adds, and how it then falls."""
    bounds = [501, 751, 801, *range(1001, STEPS + 2, 200)]
    rows = []
    for first, end in pairwise(bounds):
        cells = " | ".join(f"{above(losses, run, first, end - 1):.3f}" for run in LIGHTHOUSE)
        rows.append(f"| {first:,} to {end - 1:,} | {cells} |")
    last, after, second, end = (
        {run: above(losses, run, first, first + 199) for run in LIGHTHOUSE} for first in (1601, 1801, 2001, 2801)
    )
    added = [after[run] - last[run] for run in LIGHTHOUSE]
    rows.append("{:.3f}, {:.3f}, {:.3f} and {:.3f}".format(*added))
    halves = [800 / math.log2(second[run] / end[run]) for run in LIGHTHOUSE]
    rows.append("halves in {:.0f}0, {:.0f}0, {:.0f}0 and {:.0f}0 iterations".format(*(x / 10 for x in halves)))
    more = [half * math.log2(end[run] / 0.005) for run, half in zip(LIGHTHOUSE, halves, strict=True)]
    rows.append("{:,.0f}, {:,.0f}, {:,.0f} and {:,.0f} dense iterations more".format(*(round(x, -2) for x in more)))
    runs = {row["run"]: row for row in kept("qwen3-3000", "runs")}
    rows.append("its spike is {:.2f}, {:.2f}, {:.2f} and {:.2f}".format(*(runs[run]["spike"] for run in LIGHTHOUSE)))
    back = (runs[run]["iterations_to_recover"] for run in LIGHTHOUSE)
    rows.append("after {}, {}, {} and {} iterations".format(*back))
    assert not missing_in_docs(rows, PAGE)


def test_the_fall_and_the_second_fall(losses: Losses) -> None:
    """Where losses fall below a nat, and what the change to Lighthouse does."""
    first = {run: below(losses, run, 1) for run in ("dense", "dense-2", *LIGHTHOUSE)}
    again = [below(losses, f"warm{seed}", 1, WARMUP) for seed in SEEDS]
    rows = [f"{first[run]} and {first[f'{run}-2']}" for run in ("warm", "dense", "mass")]
    rows.append(f"again at {again[0]} and {again[1]}")
    before, change = ([mean(losses, f"warm{seed}", *of) for seed in SEEDS] for of in ((701, 750), (751, 760)))
    rows.append("from {:.2f} and {:.2f} to {:.2f} and {:.2f}".format(*before, *change))
    level = [next(i for i in range(WARMUP + 75, SWITCH) if above(losses, f"warm{seed}", i - 74, i) <= 0) for seed in SEEDS]
    rows.append("level with dense at {:,} and {:,}".format(*level))
    assert not missing_in_docs(rows, PAGE)
    rise = [after - own for own, after in zip(before, change, strict=True)]
    assert not missing_in_docs([f"rose by {min(rise):.1f} nats"], "recipe.md")


def test_where_in_a_sequence_it_is_above_dense(results: Results) -> None:
    found = {
        run: [row["above"] for row in positions(results) if row["run"] == run and row["start"] >= 512] for run in LIGHTHOUSE
    }
    spans = [f"{min(values):.3f} to {max(values):.3f}" for values in found.values()]
    assert not missing_in_docs(["`mass` {} and {}, `warm` {} and {}".format(*spans)], PAGE)
    assert all(found[f"warm{seed}"][-1] < found[f"warm{seed}"][0] for seed in SEEDS)  # less far back
