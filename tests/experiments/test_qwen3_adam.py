"""What the docs say of a Qwen3-like model by Adam, from its results."""

from __future__ import annotations

from statistics import fmean

import pytest

from experiments import archive
from experiments.pairs import positions
from experiments.tables import Results, Row
from tests.experiments.kept import RESULTS, kept, missing_in_docs
from tests.experiments.test_qwen3_results import PAGE, SEEDS, SWITCH, Losses, above, below, dense_of, of

LIGHTHOUSE = ("mass", "mass-2", "causal", "causal-2")
BOTH = ("qwen3-adam", "qwen3-3000")
SMOOTH = 75
"""W of these runs."""


@pytest.fixture(scope="module")
def results() -> Results:
    return archive.read(RESULTS / "qwen3-adam" / "work.tgz")


@pytest.fixture(scope="module")
def losses(results: Results) -> Losses:
    return {run: results.losses(run) for run in results.facts["runs"]}


@pytest.fixture(scope="module")
def runs() -> dict[str, Row]:
    return {row["run"]: row for row in kept("qwen3-adam", "runs")}


@pytest.fixture(scope="module")
def judged() -> dict[str, Row]:
    """Each run less the dense run of its seed, and the second dense run less the first."""
    return {row["run"]: row for row in kept("qwen3-adam", "pairs") if row["against"].startswith("dense")}


def seeds(run: str, rows: dict[str, Row]) -> list[Row]:
    return [rows[f"{run}{seed}"] for seed in SEEDS]


def test_losses_and_passkeys(runs: dict[str, Row], judged: dict[str, Row]) -> None:
    rows = []
    for run, row in runs.items():
        cells = [f"`{run}`", f"{row['held_out_loss']:.4f}"]
        if run in LIGHTHOUSE:
            answers = (f"{row[f'{kind}_accuracy']:.1%} ({of(judged[run], '+.1%', kind)})" for kind in ("noise", "classic"))
            cells += [of(judged[run], "+.4f"), *answers]
        else:
            cells += ["", f"{row['noise_accuracy']:.1%}", f"{row['classic_accuracy']:.1%}"]
        rows.append(f"| {' | '.join(cells)} |")
    means = [fmean(row["difference"] for row in seeds(run, judged)) for run in ("mass", "causal")]
    assert all(judged[run]["difference"] <= 0.005 for run in LIGHTHOUSE)  # the bar, by either seed
    rows.append("In the mean `mass` ends {:.4f} below dense and `causal` {:.4f}".format(*(-mean for mean in means)))
    first, second = ([row["difference"] for row in seeds(run, judged)] for run in ("mass", "causal"))
    rows.append(f"{-first[0]:.4f} below dense and {first[1]:.4f} above, after 3,000 iterations")
    rows.append("ends {:.4f} and {:.4f} below".format(*(-x for x in second)))
    rows.append(f"lie {-judged['dense-2']['difference']:.4f} apart")
    fewer = sorted(-judged[run]["noise_accuracy_difference"] * 100 for run in LIGHTHOUSE)
    assert fewer[0] == pytest.approx(-judged["mass-2"]["noise_accuracy_difference"] * 100)
    rows.append(f"by {fewer[0]:.0f} to {fewer[-1]:.1f} points")
    rows.append(f"Dense seeds lie {-judged['dense-2']['noise_accuracy_difference'] * 100:.0f} points apart")
    rows.append(f"learnt nothing ({runs['dense']['classic_accuracy']:.1%})")
    classic = {run: judged[run]["classic_accuracy_difference"] * 100 for run in ("mass-2", "causal-2")}
    rows.append(f"`mass-2` gains {classic['mass-2']:.1f} points, and `causal-2` loses {-classic['causal-2']:.1f}")
    other = {row["run"]: row["difference"] for row in kept("qwen3-adam", "pairs") if row["against"].startswith("mass")}
    rows.append(f"`causal` less `mass` is {other['causal']:+.4f} and {other['causal-2']:+.4f}")
    assert not missing_in_docs([row.replace("|  |", "| |") for row in rows], PAGE)
    short = [
        f"| … by Adam, `mass`: loss | `qwen3-adam`, 98 MB | {' | '.join(of(row, '+.4f') for row in seeds('mass', judged))} |",
        f"| … by Adam, causal: loss | | {' | '.join(of(row, '+.4f') for row in seeds('causal', judged))} |",
        *(
            f"| … {words} | | {' | '.join(of(row, '+.1%', kind) for row in seeds(run, judged))} |"
            for run in ("mass", "causal")
            for words, kind in (("passkey", "noise"), ("classic passkey", "classic"))
        ),
        "{:.4f} below dense, in the mean of two seeds, and a causal selection {:.4f}".format(*(-mean for mean in means)),
    ]
    assert not missing_in_docs(short, "quality.md")


def test_where_they_fall_and_pass_dense(losses: Losses, judged: dict[str, Row]) -> None:
    at = {run: below(losses, run, 1) for run in losses}
    assert all(at[run] > at[dense_of(run)] for run in LIGHTHOUSE)
    pairs = {run: f"{at[run]:,} and {at[f'{run}-2']:,}" for run in ("mass", "causal", "dense")}
    rows = [f"{pairs['mass']} (`mass`), {pairs['causal']} (`causal`), dense at {pairs['dense']} (means of 51)"]
    level = sorted(row["iterations_to_catch_up"] for row in judged.values() if row["iterations_to_catch_up"])
    assert len(level) == 3
    rows.append(f"Three of them pass it, {level[0]:.0f} to {level[-1]:.0f} iterations after the switch")
    assert not missing_in_docs(rows, PAGE)


def test_where_in_a_sequence(results: Results) -> None:
    found = {run: {row["start"]: row["above"] for row in positions(results) if row["run"] == run} for run in LIGHTHOUSE}
    late = [[above for start, above in found[run].items() if start >= 32] for run in LIGHTHOUSE]
    spans = [f"{min(values):+.3f} to {max(values):+.3f}" for values in late]
    early = [above for run in LIGHTHOUSE for start, above in found[run].items() if 1 <= start < 16]
    rows = ["`mass` {} and {}, `causal` {} and {}".format(*spans), f"by {min(early):.3f} to {max(early):.3f}"]
    assert not missing_in_docs(rows, PAGE)


def test_what_the_switch_takes(results: Results, losses: Losses, runs: dict[str, Row], judged: dict[str, Row]) -> None:
    before = {run: above(losses, run, SWITCH - SMOOTH + 1, SWITCH) for run in LIGHTHOUSE}
    first, smooth, later = (
        {run: above(losses, run, SWITCH + a, SWITCH + b) - before[run] for run in LIGHTHOUSE}
        for a, b in ((1, 10), (1, SMOOTH), (SMOOTH + 1, 200))
    )
    foresight = {row["run"]: row for row in kept("qwen3-adam", "hindsight") if row["distance"] == 0}
    causal = [row for row in kept("qwen3-adam", "hindsight") if row["run"].startswith("causal")]
    assert len(causal) == 20
    assert all(row["loss_true_future"] == row["loss_other_future"] and row["standard_error"] == 0 for row in causal)
    hints = {
        run: "0" if run.startswith("causal") else f"{row['difference']:.3f} ± {row['standard_error']:.3f}"
        for run, row in foresight.items()
    }

    def row(title: str, cells: dict[str, float], form: str) -> str:
        return f"| {title} | {' | '.join(f'{cells[run]:{form}}' for run in LIGHTHOUSE)} |"

    spikes, own = {run: runs[run]["spike"] for run in LIGHTHOUSE}, {run: judged[run]["dense_spike"] for run in LIGHTHOUSE}
    rows = [
        row("above dense before", before, ".3f"),
        row("more in the first ten iterations after", first, "+.3f"),
        row("… in the first 75", smooth, "+.3f"),
        row("… from the 76th to the 200th", later, "+.3f"),
        f"| hindsight at the switch | {' | '.join(hints[run] for run in LIGHTHOUSE)} |",
        row("spike over the level of stage 1", spikes, "+.3f"),
        row("dense's own, in the same iterations", own, "+.3f"),
        f"has one of {own['causal']:.3f} and {own['causal-2']:.3f} in the same iterations",
        f"`causal` has {spikes['causal']:.3f}, which is over the bar, and {spikes['causal-2']:.3f}",
        f"it rises by {first['causal']:.2f} and {first['causal-2']:.2f} for ten iterations",
    ]
    assert not missing_in_docs(rows, PAGE)
    level = {run: foresight[run]["loss_true_future"] for run in LIGHTHOUSE}
    short = [
        f"| `{run}`, `qwen3-adam` | {level[run]:.3f} | {hints[run]} | {spikes[run]:+.2f} | {own[run]:+.2f} |"
        for run in LIGHTHOUSE
    ]
    assert not missing_in_docs(short, "quality.md")


def test_by_muon_it_is_further_on(losses: Losses) -> None:
    """Where a dense run by Muon has the training loss that the one by Adam ends with, in means of 75."""
    muon = archive.read(RESULTS / "qwen3-3000" / "work.tgz")
    found, levels = [], []
    for run in ("dense", "dense-2"):
        ends = fmean(losses[run][i] for i in range(3001 - SMOOTH, 3001))
        other = muon.losses(run)
        levels.append(ends)
        found.append(next(i for i in range(100, 2950) if fmean(other[j] for j in range(i - 37, i + 38)) < ends))
    rows = ["at iteration {:,} and {:,}".format(*found), "training losses of {:.2f} and {:.2f}".format(*levels)]
    assert not missing_in_docs(rows, PAGE)
    ends = [fmean(row["held_out_loss"] for row in kept(name, "runs") if row["title"].startswith("dense from")) for name in BOTH]
    assert not missing_in_docs([f"dense is {ends[0] - ends[1]:.2f} lower"], "quality.md")
