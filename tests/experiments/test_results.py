"""What is kept of the experiments: the same bytes as their archives make, and what the docs say of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from experiments import archive, pairs, study_table
from experiments.__main__ import main
from experiments.runs import BASE, EXPERIMENTS
from experiments.tables import Row
from tests.experiments.kept import RESULTS, kept, missing_in_docs
from tests.mcore.harness import some_slow

ARCHIVED = sorted(path.parent.name for path in RESULTS.glob("*/work.tgz"))


@pytest.mark.parametrize("experiment", some_slow(ARCHIVED, {"variants"}))
def test_what_is_kept_is_what_the_archive_makes(experiment: str, tmp_path: Path) -> None:
    results = archive.read(RESULTS / experiment / "work.tgz")
    pairs.write(results, tmp_path)
    (tmp_path / "table.md").write_text(study_table.table_of(results))
    names = {path.name for path in (RESULTS / experiment).iterdir() if path.suffix not in (".png", ".tgz")}
    assert {"runs.csv", "pairs.csv", "table.md"} <= names
    for name in sorted(names):
        assert (RESULTS / experiment / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_every_experiment_keeps_its_archive() -> None:
    known = {"pilot", "recipe", "short", "variants", "parallax", "parallax-normed", "qwen3", "qwen3-3000", "qwen3-adam", "wall"}
    assert known <= {*ARCHIVED}
    assert {re.sub(r"-\d+$", "", name) for name in ARCHIVED} <= {
        *EXPERIMENTS
    }  # a longer run of one has its iterations in its name


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "has no quality.json, no RUN/run.json and no work.tgz"), (b"no archive", "is no whole work.tgz")],
)
def test_what_holds_no_results_is_refused(
    content: bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path if content is None else tmp_path / "work.tgz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        main(["--remake", str(path), "--out", str(tmp_path / "out")])
    assert f"{path} {says}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ['{"experiment": "tin', "", "[]", "{}"])
def test_a_run_whose_facts_are_cut_short_is_not_left_out_in_silence(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, facts in (("dense", '{"experiment": "tiny"}'), ("norm-60", content)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(facts)
    with pytest.raises(SystemExit):
        main(["--remake", str(tmp_path), "--out", str(tmp_path / "out")])
    assert f"{tmp_path / 'norm-60' / 'run.json'} is cut short" in " ".join(capsys.readouterr().err.split())


def test_docs_say_what_the_recipe_gave() -> None:
    """Its table, from its results."""
    runs = {row["run"]: row for row in kept("recipe", "runs")}
    above = {row["run"]: row for row in kept("recipe", "pairs") if row["against"].startswith("dense")}
    mean = (above[BASE]["difference"] + above[f"{BASE}-2"]["difference"]) / 2
    rows = [f"| mean | | | **{mean:+.4f}** (it was to be at most +0.005) |"]
    for dense, run in (("dense", BASE), ("dense-2", f"{BASE}-2")):
        ours, theirs, pair = runs[run], runs[dense], above[run]
        assert pair["same_gpu"] == "yes"
        held_out = f"{pair['difference']:+.4f} ± {pair['standard_error']:.4f}"
        rows.append(f"| {theirs['held_out_loss']:.4f} | {ours['held_out_loss']:.4f} | {held_out} |")
        rows.append(f"| {theirs['steady_seconds']:.0f} | {ours['steady_seconds']:.0f} | **{pair['steady_ratio']:.3f}**")
        speeds = [ours[f"tokens_per_second_{stage}"] for stage in ("lighthouse", "dense")]
        rows.append(f"| {theirs['tokens_per_second_dense']:,.0f} | {speeds[0]:,.0f} and {speeds[1]:,.0f} | |")
        for filler in ("noise", "classic"):
            change, error = (pair[f"{filler}_accuracy_{what}"] for what in ("difference", "error"))
            accuracies = [row[f"{filler}_accuracy"] for row in (theirs, ours)]
            rows.append(f"| {accuracies[0]:.1%} | {accuracies[1]:.1%} | {change:+.1%} ± {error:.1%} |")
    for name, form in (("spike", "+.3f"), ("iterations_to_catch_up", ",.0f")):
        values = [({**runs[run], **above[run]})[name] for run in (BASE, f"{BASE}-2")]
        rows.append(f"| 1, 2 | | | {values[0]:{form}}, {values[1]:{form}} |")
    assert not missing_in_docs(rows)


def test_docs_say_what_the_variants_gave() -> None:
    """Both tables of them, likewise."""
    above = {(row["run"], row["against"]): row for row in kept("variants", "pairs")}
    hindsight = {(row["run"], row["distance"]): row for row in kept("variants", "hindsight")}

    def measured(row: dict[str, Any] | None, form: str, name: str, error: str) -> str:
        return f"{row[name]:{form}} ± {row[error]:{form.lstrip('+')}}" if row else ""

    def hint(run: str, distance: int, form: str) -> str:
        return measured(hindsight.get((run, distance)), form, "difference", "standard_error")

    rows = []
    for row in kept("variants", "runs"):
        run = row["run"]
        if row["held_out_loss"] is None:
            continue
        losses = [measured(above.get((run, to)), "+.4f", "difference", "standard_error") for to in ("dense", BASE)]
        passkey = measured(above.get((run, "dense")), "+.1%", "noise_accuracy_difference", "noise_accuracy_error")
        spike = "" if row["spike"] is None else f"{row['spike']:+.2f}"
        cells = [f"`{run}`", f"{row['held_out_loss']:.4f}", *losses, f"{row['noise_accuracy']:.1%}", passkey, spike]
        rows.append(f"| {' | '.join([*cells, hint(run, 0, '.2f')])} |")
    assert len(rows) == 11
    for run in sorted({run for run, _ in hindsight}):
        last = hindsight[run, 0]
        mean = f"**{hint(run, 0, '.3f')}**" if run == BASE else hint(run, 0, ".3f")
        losses = [f"{last[name]:.3f}" for name in ("loss_true_future", "loss_other_future")]
        rows.append(f"| `{run}` | {' | '.join(losses)} | {mean} | {hint(run, 1, '.3f')} |")
    assert len(rows) == 15
    assert not missing_in_docs(rows)


def test_docs_say_what_wall_gave() -> None:
    """Losses by position, without the errors that table.md has beside them, and differences in the text."""
    _, (header, _, *lines) = (part.splitlines() for part in (RESULTS / "wall" / "table.md").read_text().strip().split("\n\n"))
    found = {line.split("`")[1]: [cell.split("(")[0].strip() for cell in line.split("|")[2:-1]] for line in lines}
    titles = {row["run"]: row["title"] for row in kept("wall", "runs")}
    assert found.keys() == titles.keys() == EXPERIMENTS["wall"].runs.keys()
    rows = [header.replace("positions", "run"), *(f"| `{run}`: {titles[run]} | {' | '.join(found[run])} |" for run in found)]
    rises = [float(found[run][-1]) - float(found[run][0]) for run in ("dense", "rope-500k")]
    rows.append(f"by {rises[0]:.2f} and {rises[1]:.2f}\n  nats")
    for run in ("wall", "rope-500k"):  # within the trained length
        difference = re.search(rf"^\| `{run}` \| [\d.]+ \(-([\d.]+ ± [\d.]+)\)", "\n".join(lines), re.MULTILINE)
        assert difference
        rows.append(difference[1])
    losses = {row["run"]: f"{row['training_loss']:.2f}" for row in kept("wall", "runs")}
    assert len({losses[run] for run in losses if run != "nope"}) == 1
    rows.append(f"(training loss {losses['nope']}, the others {losses['wall']})")
    assert not missing_in_docs(rows)


def test_docs_say_what_parallax_gave() -> None:
    """Held-out losses with norms, each less that of softmax by the same optimizer; and what came of it without."""
    losses = {row["run"]: row for row in kept("parallax-normed", "runs")}
    above = {(row["run"], row["against"]): row for row in kept("parallax-normed", "pairs")}
    rows = []
    for run, softmax in (("parallax", "dense"), ("parallax-muon", "dense-muon")):
        pair = above[run, softmax]
        rows.append(f"| `{softmax}`: {losses[softmax]['title']} | {losses[softmax]['held_out_loss']:.4f} | |")
        difference = f"{pair['difference']:+.4f} ± {pair['standard_error']:.4f}"
        rows.append(f"| `{run}`: {losses[run]['title']} | {losses[run]['held_out_loss']:.4f} | {difference} |")
    gains = [above[run]["difference"] for run in (("dense-muon", "dense"), ("parallax-muon", "parallax"))]
    rows.append(f"by {-gains[0]:.2f} nats with softmax, by {-gains[1]:.2f} with Parallax")
    without = {row["run"]: row for row in kept("parallax", "runs")}
    rows.append(f"It ended at {without['parallax']['held_out_loss']:.2f}, softmax at {without['dense']['held_out_loss']:.2f}\n")
    rows.append(f"stopped after {without['parallax-muon']['iterations']} iterations")
    assert not missing_in_docs(rows)


def test_the_short_page_says_what_the_results_say() -> None:
    """Its tables, and the figures beside them."""
    runs, pairs_of = ({name: kept(name, table) for name in ("recipe", "variants", "short")} for table in ("runs", "pairs"))
    above = {(name, row["run"], row["against"]): row for name, rows in pairs_of.items() for row in rows}
    found = {(name, row["run"]): row for name, rows in runs.items() for row in rows}

    def of(name: str, form: str, what: str = "difference", error: str = "standard_error", experiment: str = "recipe") -> str:
        rows = [above[experiment, f"{name}{seed}", f"dense{seed}"] for seed in ("", "-2")]
        return " | ".join(f"{row[what]:{form}} ± {row[error]:{form.lstrip('+')}}" for row in rows)

    def both(form: str, rows: list[Row], what: str) -> str:
        return " | ".join(f"{row[what]:{form}}" for row in rows)

    judged = [above["recipe", f"{BASE}{seed}", f"dense{seed}"] for seed in ("", "-2")]
    rows = [
        f"| the recipe: loss | `recipe`, 32K, 197 MB | {of(BASE, '+.4f')} |",
        f"| … passkey | | {of(BASE, '+.1%', 'noise_accuracy_difference', 'noise_accuracy_error')} |",
        f"| … steady seconds, of dense's | | {both('.3f', judged, 'steady_ratio')} |",
        f"| … spike at the switch | | {both('+.3f', [found['recipe', row['run']] for row in judged], 'spike')} |",
        f"| … level with dense, iterations after it | | {both('.0f', judged, 'iterations_to_catch_up')} |",
        f"| two dense runs apart: loss | | | {above['recipe', 'dense-2', 'dense']['difference']:+.4f} |",
        f"| too short a dense stage: loss | `short`, 32K, 52 MB | {of(BASE, '+.3f', experiment='short')} |",
    ]
    settings = [row for row in pairs_of["variants"] if row["against"] == "dense" and row["difference"] is not None]
    assert len(settings) == 10
    losses, answers = (sorted(row[name] for row in settings) for name in ("difference", "noise_accuracy_difference"))
    rows += [
        f"| ten settings: loss | `variants`, 16K, 88 MB | {losses[0]:+.4f} to {losses[-1]:+.4f} | |",
        f"| … passkey | | {answers[0]:+.1%} to {answers[-1]:+.1%} | |",
    ]
    assert answers[-2] < 0  # nine of ten are below
    again = above["variants", f"{BASE}-again", BASE]
    apart = f"{again['difference']:+.4f}, {again['noise_accuracy_difference']:+.1%}"
    rows.append(f"| one setting twice apart: loss, passkey | | {apart} | |")
    for row in kept("variants", "hindsight"):
        if row["distance"] == 0:
            hint = f"{row['difference']:.2f} ± {row['standard_error']:.2f}"
            spike, own = found["variants", row["run"]]["spike"], above["variants", row["run"], "dense"]["dense_spike"]
            rows.append(f"| `{row['run']}` | {row['loss_true_future']:.3f} | {hint} | {spike:+.2f} | {own:+.2f} |")
    assert len(rows) == 14
    for run, words in {
        "three-levels": "three levels end {:.3f} higher",
        "half-budget": "half ends {:.3f} higher",
        "double-budget": "twice {:.3f}, which may be chance",
        "norm-75": "75% ends {:.3f} higher",
    }.items():
        rows.append(words.format(above["variants", run, BASE]["difference"]))
    assert not missing_in_docs(rows, "quality.md")
