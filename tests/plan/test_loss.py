"""The memory of logits and loss, held to a run that died of them, and which pipeline stage has what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.plan import memory
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.model import GPT
from megatron_lighthouse.plan.run import Run, run_of
from megatron_lighthouse.plan.time import step_parts

WHOLE = {"loss_tile_tokens": 0}
QWEN3 = Run(GPT(28, 1024, 3072, 16, 8, 128, 151936), 2**17, device=DEVICES["h200"], recompute="full", loss_fusion=True, **WHOLE)
"""Qwen3-0.6B's shape at 131,072 tokens."""
HELD, ASKED = 124.5, 74.2
"""GiB that its first iteration held on an H200, and asked for in vain, with --cross-entropy-fusion-impl native."""
NAME, ATTENTION = "logits and loss", "backward of its attention, beyond that"


def test_the_run_that_died_does_not_fit() -> None:
    assert not memory.fits(QWEN3.check())
    moments = 2 / 3 * memory.parts(QWEN3)["optimizer (fp32 master, two moments)"]  # not made yet
    assert (memory.total(QWEN3) - moments) / 2**30 == pytest.approx(HELD + ASKED, rel=0.01)
    assert memory.fits(QWEN3.change(loss_fusion=False).check())


def test_in_tiles_it_fits_with_a_gibibyte_of_logits() -> None:
    tiled = QWEN3.change(loss_tile_tokens=None)
    assert tiled.logits_at_once == 1766
    assert memory.total(tiled.check()) / 2**30 < 28
    alone = memory.total(QWEN3) - memory.total(tiled)
    gradient = 6 * 151936 * 1024  # of the output weight: a tile's in bf16, the sum in fp32
    gradient += 4 * 2**17 * 1024  # the output layer's input, and its gradient
    hidden = sum(memory.parts(tiled)[name] for name in ("backward of a layer", ATTENTION)) - gradient - 1766 * 151936 * 10
    assert alone == pytest.approx((2**17 - 1766) * 151936 * 10 - gradient - max(0.0, hidden), rel=1e-9)


def test_tiles_cost_their_sums() -> None:
    seconds = [step_parts(QWEN3.change(loss_tile_tokens=tile), coefficients())["logits and loss"] for tile in (0, 2**17, 4096)]
    assert seconds[0] == seconds[1]
    moved = 32 * 151936 * 1024 * 10  # a tile: its gradient of the weight in bf16, and the sum in fp32, there and back
    assert seconds[2] - seconds[0] == pytest.approx(moved / QWEN3.device.memory_bytes_s * coefficients().copy)


def test_mlps_in_tiles_hold_a_tile_and_cost_a_forward() -> None:
    million = QWEN3.change(seq_length=2**20, config=LighthouseConfig.for_length(2**20), loss_tile_tokens=None)
    tiled = million.change(mlp_tile_tokens=2**16)
    layer = [memory.parts(run)["backward of a layer"] for run in (million, tiled)]
    assert layer[0] - layer[1] == 2 * 3072 * (2**20 * (3 + 2) - 2**16 * 5)  # kept and its gradients, but for a tile's
    seconds = [step_parts(run, coefficients())["linear layers"] for run in (million, tiled)]
    assert seconds[1] / seconds[0] == pytest.approx(1 + 3 * 1024 * 3072 / (3 * 1024 * 3072 + 1024 * 128 * (2 * 16 + 2 * 8)) / 4)


def test_a_million_tokens_by_hand() -> None:
    """MLPs in tiles: most is there when attention is made again, at its projection: the gradient of the layer's output, what
    the first norm and the projection gave; Q, K, V as one; Q and K before their norms, after, and turned; and the output."""
    model, rows = replace(QWEN3.model, dense_first=0, dense_last=0, tied=True), 114688  # 2^20 / 64 + 3·4·8192 of k = 8192
    config = LighthouseConfig(levels=4, budget=8192, scorer="mass")
    options = {"qk_layernorm": True}
    run = QWEN3.change(
        model=model, seq_length=2**20, config=config, mlp_tile_tokens=2**14, options=options, loss_tile_tokens=None
    )
    hidden, columns, keys = 1024, 16 * 128, 2 * 8 * 128
    gathered = rows * (2 * (2 * columns + keys) + 4 * 16) + (2**20 + 2**18 + 2**16 + 2**14) * 8 * 4
    layer = 2**20 * 2 * (3 * hidden + (columns + keys) + 3 * (columns + keys // 2) + columns) + gathered
    found = memory.parts(run.check())
    assert found["backward of a layer"] + found["backward of its attention, beyond that"] == layer
    assert found["angles of RoPE (fp32)"] == 2**29
    assert found["activations"] == 28 * 2**31


def test_tensor_parallel_ranks_share_the_logits() -> None:
    run = run_of("llama3-8b-128k", tensor_parallel=1, context_parallel=8, seq_length=2**20, recompute="full", **WHOLE)
    one, two = (memory.parts(run.change(tensor_parallel=tp, context_parallel=8 // tp)) for tp in (1, 2))
    whole = 2**17 * 128256 * 6
    assert one[NAME] + one["backward of a layer"] == pytest.approx(whole)
    assert two[NAME] + two["backward of a layer"] + two["backward of its attention, beyond that"] == pytest.approx(
        whole, rel=1e-3
    )


def test_pipeline_stages_hold_what_is_theirs() -> None:
    """The first the embedding and most micro batches, the last the logits and one; in between neither."""
    run = run_of("llama3-8b-512k", pipeline_parallel=4, tensor_parallel=2, **WHOLE)
    stages = [memory.parts(run, stage) for stage in range(4)]
    assert [bool(parts[NAME]) for parts in stages] == [False, False, False, True]
    parameters = [parts["parameters (bf16)"] for parts in stages]
    assert parameters[0] > parameters[1] == parameters[2] < parameters[3]
    assert parameters[0] - parameters[1] == 2 * run.vocab_rank * 4096
    assert stages[0]["activations"] > stages[2]["activations"] > stages[3]["activations"]
    assert memory.total(run) == max(sum(parts.values()) for parts in stages)
    run = run.change(recompute="full")
    small = run.change(model=replace(run.model, vocab=384))
    assert (memory.stage_name(run), memory.stage_name(small)) == ("last", "first")


def test_recompute_costs_time_and_saves_memory() -> None:
    runs = [run_of("530m-98k", recompute=r) for r in ("none", "mlp", "full")]
    times = [sum(step_parts(run, coefficients()).values()) for run in runs]
    assert times == sorted(times)
    assert memory.total(runs[0]) > memory.total(runs[1]) > memory.total(runs[2])
