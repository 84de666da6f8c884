"""Parallax in the plan, alone and with Lighthouse around it: more of what it takes more of, and said to be predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lighthouse.plan import memory, report, time
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.layer_time import Setup, dense_layer
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.stages import Stages
from megatron_lighthouse.plan.words import recipe_words, run_of_words
from megatron_lighthouse.variants import PARALLAX

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "530m-98k.args"


def run_with(*words: str) -> Run:
    return run_of_words([*recipe_words(RECIPE), *words], DEVICES["h100"]).check()


DENSE, PLAIN = run_with("--attention", "dense"), run_with("--attention", "parallax")
LIGHTHOUSE = run_with("--attention", "lighthouse")
AROUND = run_with("--attention", "lighthouse", "--lighthouse-around", "parallax")


@pytest.mark.parametrize(("ours", "softmax"), [(PLAIN, DENSE), (AROUND, LIGHTHOUSE)], ids=["alone", "around"])
def test_it_has_a_projection_more(ours: Run, softmax: Run) -> None:
    model = ours.model
    more = model.hidden * model.heads * model.head_dim
    assert ours.layer_matrices - softmax.layer_matrices == more
    assert ours.parameters - softmax.parameters == model.layers * more
    assert time.rank_parameters(ours) - time.rank_parameters(softmax) == model.layers * more / model_ranks(ours)


def model_ranks(run: Run) -> int:
    return run.tensor_parallel * run.pipeline_parallel


def test_memory_counts_what_it_keeps() -> None:
    """r and Σ p v, bf16: of all tokens, or of gathered rows."""
    columns = 2 * 2 * PLAIN.model.heads * PLAIN.model.head_dim / PLAIN.tensor_parallel
    assert memory.dense_activations(PLAIN) - memory.dense_activations(DENSE) == pytest.approx(columns * PLAIN.tokens)
    rows = AROUND.geometry.gathered_length / AROUND.context_parallel
    found = memory.lighthouse_activations(AROUND) - memory.lighthouse_activations(LIGHTHOUSE)
    assert found == pytest.approx(columns * rows)


def test_time_is_so_many_times_that_of_softmax() -> None:
    speed = coefficients()
    setup = Setup(DENSE.layer, DENSE.device, speed)
    dense, ours = dense_layer(98304, setup), dense_layer(98304, replace(setup, base=PARALLAX))
    work = PARALLAX.work(None, DENSE.layer)
    assert ours["fwd"] == pytest.approx(work.forward * dense["fwd"])
    assert ours["fwd+bwd"] == pytest.approx(work.both * dense["fwd+bwd"])
    assert time.tokens_per_gpu(AROUND, speed) > 2 * time.tokens_per_gpu(PLAIN, speed)


def test_stage_2_is_what_stage_1_was_around() -> None:
    assert [run.attention for run in Stages(AROUND).check().runs] == ["lighthouse", "parallax"]
    assert Stages(AROUND).dense.parameters == AROUND.parameters


def test_it_is_said_to_be_predicted() -> None:
    speed = coefficients()
    assert "Lighthouse around Parallax in" in report.kind(AROUND)
    for run in (PLAIN, AROUND):
        assert "parallax [predicted: as its kernels to cuDNN's" in report.time_table(run, speed)
    assert "predicted" not in report.time_table(LIGHTHOUSE, speed)
