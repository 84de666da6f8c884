"""A study's tables in Markdown: a line a run, and losses by position beyond what was trained. Imports no Megatron. Ours."""

from __future__ import annotations

from itertools import pairwise

import numpy

from experiments.pairs import buckets_of, dense_of, documents_of, mean_and_error_of, paired, pairs
from experiments.runs import EXPERIMENTS
from experiments.summary import difference, number, table
from experiments.tables import Results, Row


def table_of(results: Results) -> str:
    """table.md of any experiment."""
    return (study_table if EXPERIMENTS[results.facts["experiment"]].study else table)(results)


def study_table(results: Results) -> str:
    """The losses of each run, less those that it is compared with; then by position, less those of its softmax run."""
    lines = _header("run", "MB read", "training loss", "held-out loss", "above")
    found = {(row["run"], row["against"]): row for row in pairs(results)}
    for row in results.tables["runs"]:
        run = row["run"]
        above = [
            f"{difference(found[run, other]['difference'], found[run, other]['standard_error'], '.4f')} (`{other}`)"
            for other in results.runs[run].against
            if found.get((run, other), {}).get("difference") is not None
        ]
        named = f"`{run}`: {row['title']}" + ("" if row["iterations"] == row["steps"] else f" ({row['iterations']} iterations)")
        losses = (number(row[name], ".4f") for name in ("training_loss", "held_out_loss"))
        lines.append(_line(named, f"{row['tokens'] / 1e6:.1f}", *losses, "; ".join(above)))
    if any(map(trained_shorter, results.facts["runs"].values())):
        lines += ["", *_by_position(results)]
    return "\n".join(lines) + "\n"


def trained_shorter(facts: Row) -> bool:
    """Whether a run's evaluation reads longer sequences than it was trained on."""
    return bool(facts.get("evaluated", 0) > facts["seq_length"])


def _by_position(results: Results) -> list[str]:
    """Up to the length that was trained, and in each bucket of positions after it."""
    lines: list[str] = []
    for run, facts in results.facts["runs"].items():
        if not results.of("sequences", run):
            continue
        _, edges, losses = buckets_of(results, run)
        edges_of_bands = [0, *(edge for edge in edges if edge >= facts["seq_length"])]
        lines = lines or _header("positions", *(f"{a:,} to {b - 1:,}" for a, b in pairwise(edges_of_bands)))
        above = paired(results, run, dense_of(results, run))
        cells = []
        for begin, end in pairwise(edges_of_bands):
            inside = slice(edges.index(begin), edges.index(end))
            widths = numpy.diff(edges)[inside] / (end - begin)
            cell = number(float(losses[:, inside].mean(0) @ widths), ".4f")
            if above is not None:
                mean, error = mean_and_error_of(above[:, inside] @ widths, documents_of(results, run))
                cell += f" ({difference(float(mean), None if error is None else float(error), '.4f')})"
            cells.append(cell)
        lines.append(_line(f"`{run}`", *cells))
    return lines


def _header(*titles: str) -> list[str]:
    return [_line(*titles), "|" + " --- |" * len(titles)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
