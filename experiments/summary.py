"""An experiment's table in Markdown: a line a run, and what the seeds say. Imports no Megatron. Ours."""

from __future__ import annotations

from experiments.pairs import pairs
from experiments.run import REFERENCE
from experiments.runs import SECOND_SEED
from experiments.tables import Results, Row, column_of, first
from megatron_lighthouse.recipe.probe import Probe
from megatron_lighthouse.recipe.probes import PROBES

MARGIN = 0.005
"""Nats of held-out loss that a recipe may end above dense."""


def table(results: Results) -> str:
    """A line a run, in Markdown."""
    probes = [probe for probe in PROBES if first(probe) or results.tables[probe.name]]
    columns = (
        "run",
        "steady s",
        "× dense",
        "tokens/s stage 1",
        "stage 2",
        "training loss, above dense",
        "held-out loss",
        "above dense",
        *(title for probe in probes for title in (probe.title, "above dense", "log p")),
        "spike",
        "dense's own",
        "back",
        "level with dense",
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    above = {row["run"]: row for row in reversed(pairs(results))}  # the first that a run is compared with
    notes: list[str] = []
    devices = {row["run"]: row.get("device") or "device not known" for row in results.tables["runs"]}
    for row in results.tables["runs"]:
        pair = above.get(row["run"], {})
        other_gpu = pair.get("same_gpu") == "no"
        alone = row["at_once"] == 1
        cells = [
            f"`{row['run']}`: {row['title']}"
            + (f", on {devices[row['run']]}" if len(set(devices.values())) > 1 else "")
            + ("" if row["iterations"] == row["steps"] else f" ({row['iterations']} iterations)"),
            (f"{row['steady_seconds']:,.0f}" + (f" × {row['ranks']}" if row["ranks"] > 1 else "")) if alone else "",
            number(pair.get("steady_ratio"), ".3f") + ("*" if other_gpu and pair["steady_ratio"] else ""),
            *(number(row[f"tokens_per_second_{stage}"] if alone else None, ",.0f") for stage in ("lighthouse", "dense")),
            number(pair.get("gap"), "+.4f"),
            number(row["held_out_loss"], ".4f"),
            difference(pair.get("difference"), pair.get("standard_error"), ".4f"),
            *(cell for probe in probes for cell in _probed(probe, row, pair)),
            number(row["spike"], "+.3f"),
            number(pair.get("dense_spike"), "+.3f"),
            number(row["iterations_to_recover"], ",.0f"),
            number(pair.get("iterations_to_catch_up"), ",.0f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        if other_gpu and not notes:
            notes.append("\\* not on the same GPU")
    notes += verdict(above)
    for row in results.tables["hindsight"]:
        if row["distance"] == 0:
            known = difference(row["difference"], row["standard_error"], ".3f")
            notes.append(
                f"`{row['run']}` at the switch, with Lighthouse: {known} nats without what selections tell of later text."
            )
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def _probed(probe: Probe, row: Row, pair: Row) -> tuple[str, str, str]:
    """Right digits in text, above dense, and the right one's log-probability."""
    accuracy, above, error, log_probability = (
        column_of(probe, f"noise_{name}") for name in ("accuracy", "accuracy_difference", "accuracy_error", "log_probability")
    )
    return (
        number(row.get(accuracy), ".1%"),
        difference(pair.get(above), pair.get(error), ".1%"),
        number(row.get(log_probability), ".3f"),
    )


def verdict(above: dict[str, Row]) -> list[str]:
    """What two seeds say of a run, each held to the dense run of its own; and how far seeds of dense lie apart."""
    notes = []
    for name in reversed(above):  # in the order of the runs
        rows = [row for seed in (name, f"{name}-2") if (row := above.get(seed, {})).get("against", "").startswith(REFERENCE)]
        if not (loss := _of_two(rows, "difference", ".4f", " nats")):
            continue
        said = [f"`{name}` above dense, mean of two seeds: {loss}; the bar is +{MARGIN}."]
        for probe in PROBES:
            if found := _of_two(rows, column_of(probe, "noise_accuracy_difference"), ".1%"):
                said.append(f"{probe.title.capitalize()}: {found}{'; the bar is 0' if first(probe) else ''}.")
        notes.append(" ".join(said))
    if (seeds := above.get(SECOND_SEED, {}).get("difference")) is not None:
        notes.append(f"Dense with another seed: {seeds:+.4f} nats.")
    return notes


def _of_two(rows: list[Row], column: str, form: str, unit: str = "") -> str:
    """The mean of two seeds, and how far each lies from it; '' where not both are known."""
    found = [float(row[column]) for row in rows if row.get(column) is not None]
    if len(found) != 2:
        return ""
    return f"{sum(found) / 2:+{form}}{unit}, each {abs(found[0] - found[1]) / 2:{form}} from it"


def difference(value: float | None, error: float | None, form: str) -> str:
    return number(value, f"+{form}") + ("" if error is None else f" ± {error:{form}}")


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
