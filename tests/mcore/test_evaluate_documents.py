"""Evaluation of packed documents: each as if it were alone, and positions counted in it."""

from __future__ import annotations

import re
from argparse import Namespace
from itertools import pairwise

import numpy
import pytest

from megatron_lighthouse.mcore.command_line.documents import FLAG
from tests.mcore.test_evaluate import TOKENS, tiny
from tests.tolerances import assert_close

ROW = TOKENS[:65].copy()
ROW[TOKENS[:65] == 256] = 0
ROW[[2, 3, 30, 64]] = 256
"""Documents of 3, 1 and 27 tokens, and one that the row's end cuts, whose label is its end."""
PACKED = {"dataloader_inter_document_masking": True, "seq_length": 64, "loss_grid": "log2", "loss_buckets": 1}


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("budget", [None, 4], ids=["dense", "lighthouse"])
def test_documents_of_a_row_are_evaluated_each_alone(budget: int | None) -> None:
    from megatron_lighthouse.recipe.held_out_loss import by_position
    from megatron_lighthouse.recipe.trained import Trained

    args = Namespace(**PACKED, loss_sequences=1)
    together, alone = (Trained(given, 0, tiny(fused=True, budget=budget, short=True)) for given in (args, Namespace()))
    found = together.token_losses(ROW)
    bounds, counted = (0, 3, 4, 31, 64), []
    if budget:  # what is alone goes by its length too, as a row of one document
        alone = Trained(args, 0, alone.model)
    for start, stop in pairwise(bounds):
        expected = alone.token_losses(ROW[start : stop + 1])
        assert_close(found[start:stop], expected, "float32")
        counted += [*expected[: None if stop == 64 else -1]]
    assert_close(together.next_token(ROW[:-1]), alone.next_token(ROW[31:-1]), "float32")
    loss = by_position(together, ROW)
    assert_close(loss["mean"], numpy.mean(counted), "float32")
    assert [row["start"] for row in loss["buckets"]] == [0, 1, 2, 4, 8, 16, 32]
    assert loss["position_in"] == "document"
    plain = Trained(Namespace(), 0, tiny(fused=True, budget=budget, short=True)).token_losses(ROW)
    assert abs(plain[31:] - found[31:]).max() > 1e-3, "documents must see each other where they are not told apart"


def test_hindsight_is_not_asked_of_documents() -> None:
    from megatron_lighthouse.recipe.evaluate import hindsight_problems

    problems = [*hindsight_problems(Namespace(**PACKED, hindsight_samples=1, hindsight_seed=1), 200, None)]
    assert len(problems) == 1
    assert re.match(f"--hindsight-samples 1 .* with {FLAG} .* use --hindsight-samples 0", problems[0])
