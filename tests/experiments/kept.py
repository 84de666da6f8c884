"""What is kept of the experiments, and what of it the docs do not say."""

from __future__ import annotations

import re

from experiments.tables import Row, read_csv
from tests.mcore.harness import ROOT

RESULTS = ROOT / "experiments" / "results"


def kept(experiment: str, table: str) -> list[Row]:
    return read_csv(RESULTS / experiment / f"{table}.csv")


def missing_in_docs(rows: list[str], page: str = "quality_appendix.md") -> list[str]:
    """The rows and phrases that a page does not have, wherever its lines break."""
    text = " ".join((ROOT / "docs" / page).read_text().split())
    return [row for row in (re.sub(r"(?<!\w)-(?=\d)", "−", " ".join(row.split())) for row in rows) if row not in text]
