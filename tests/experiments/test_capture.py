"""What the docs say of captured attention is what was measured, by these measures."""

from __future__ import annotations

import torch

from experiments import capture
from experiments.tables import read_csv
from tests.mcore.harness import ROOT

NAMES = ("oracle", "mass", "earliest", "dilated", "summary", "norm")


def test_the_table_of_the_docs_is_what_was_measured() -> None:
    rows = read_csv(ROOT / "experiments" / "results" / "capture" / "capture.csv")
    means = {(int(row["tiles"]), row["scorer"]): float(row["mean"]) for row in rows}
    page = (ROOT / "docs" / "quality_appendix.md").read_text()
    for tiles in capture.TILES:
        assert f"| {tiles} | {' | '.join(f'{means[tiles, name]:.3f}' for name in NAMES)} |" in page
        assert means[tiles, "oracle"] - means[tiles, "mass"] <= 0.0161


def test_shares_and_what_is_captured_by_hand() -> None:
    query, key = torch.zeros(capture.TOKENS, 1, 2, capture.DIM), torch.zeros(capture.TOKENS, 1, 1, capture.DIM)
    shares = capture.far_shares(query, key)[0, 0]  # all that is far weighs alike
    seen = range(1, capture.TOKENS - capture.FAR + 1)
    assert abs(shares[0].item() - sum(min(n, capture.WINDOW) / n for n in seen) / len(seen)) < 1e-5
    assert abs(shares.sum().item() - 1) < 1e-5
    scores = torch.tensor([[[0.0, 3, 1, 2, 9, 8, 7, 6]]])
    given = torch.tensor([[[0.1, 0.2, 0, 0.1, 0.2, 0.1, 0.1, 0.2]]])
    assert round(capture.captured(given, scores, 2), 6) == 0.4
    assert round(capture.captured(given, scores, 1), 6) == 0.3
