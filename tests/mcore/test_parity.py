"""The same losses at any parallel layout: three optimizer steps from one checkpoint, against one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.mcore.harness import Run, run, some_slow
from tests.tolerances import assert_close

SAVE = "--exit-interval 2 --save checkpoint --save-interval 2".split()
START = "--finetune --no-load-optim --no-load-rng".split()

LAYOUTS = {
    "two sequences at once": (1, "--micro-batch-size 2"),
    # evaluates in micro batches of another size, which all ranks must know
    "TP2": (2, "--tensor-model-parallel-size 2 --eval-interval 2 --eval-iters 2 --eval-micro-batch-size 2"),
    "TP2+SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "PP2·VPP2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "DP2, distributed optimizer": (2, "--use-distributed-optimizer"),
    "CP2": (2, "--context-parallel-size 2"),
    "CP2, all-gather and all-to-all by layer": (2, "--context-parallel-size 2 --cp-comm-type p2p all_gather a2a p2p"),
    "CP2, recompute": (2, "--context-parallel-size 2 --recompute-granularity selective --recompute-modules core_attn"),
    "TP2·CP2": (4, "--tensor-model-parallel-size 2 --context-parallel-size 2 --sequence-parallel"),
    "PP2·CP2": (4, "--pipeline-model-parallel-size 2 --context-parallel-size 2"),
    "DP2·CP2": (4, "--context-parallel-size 2"),
    "recompute full": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "recompute core_attn": (1, "--recompute-granularity selective --recompute-modules core_attn"),
}

MASKED = {
    **{layout: LAYOUTS[layout] for layout in ("two sequences at once", "TP2+SP", "DP2, distributed optimizer", "CP2")},
    **{layout: LAYOUTS[layout] for layout in ("PP2·CP2", "DP2·CP2")},
    "CP2, dense": (2, "--context-parallel-size 2 --attention dense"),
    "CP2, per token": (2, "--context-parallel-size 2 --calculate-per-token-loss"),
    "DP2·CP2, averaged by the collective": (4, "--context-parallel-size 2 --ddp-average-in-collective"),
}
"""Layouts that are tried where ranks count different numbers of tokens, or none; for `make test` there alone."""
SLOW = {*MASKED, "PP2", "CP2, recompute", "recompute core_attn"}
"""Each is part of another."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that every run starts from: pipeline stages would draw others, each from its own seed."""
    folder = tmp_path_factory.mktemp("start")
    run(folder, "--attention", "lighthouse", "--train-iters", "1", "--save", str(folder / "checkpoint"), "--save-interval", "1")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Run:
    return run(tmp_path_factory.mktemp("one"), "--attention", "lighthouse", "--load", str(checkpoint), *START)


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, SLOW))
def test_losses_equal_those_of_one_process(layout: str, tmp_path: Path, checkpoint: Path, one_process: Run) -> None:
    ranks, arguments = LAYOUTS[layout]
    start = ["--attention", "lighthouse", "--load", str(checkpoint), *START]
    result = run(tmp_path, *start, *arguments.split(), ranks=ranks)
    assert list(result.losses) == [1, 2, 3]
    assert_same(result, one_process)


def written(folder: Path, rows: Any) -> list[str]:
    """Rows of tokens as data, in their order: the words that name it."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(folder / "text")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    builder.add_document(rows.ravel().astype(numpy.uint16), [rows.size])
    builder.finalize(f"{prefix}.idx")
    tokens = "--tokenizer-type NullTokenizer --vocab-size 257 --padded-vocab-size 384".split()
    return ["--train-data-path", prefix, "--valid-data-path", prefix, *tokens]


def assert_same(result: Run, one_process: Run) -> None:
    for found, expected, kind in (
        (result.losses, one_process.losses, "parallel loss"),
        (result.gradient_norms, one_process.gradient_norms, "parallel gradient norm"),
    ):
        assert_close(list(found.values()), list(expected.values()), kind)
        print(kind, "differs by", max(abs(found[i] - expected[i]) for i in expected))


PER_RUN = ("--attention dense", "--calculate-per-token-loss")
"""What one process must be given too."""


WITH_EDGES = ["--attention", "lighthouse", "--lighthouse-edge-budget", "16"]
EDGES = {"CP2": LAYOUTS["CP2"], "TP2·CP2": LAYOUTS["TP2·CP2"]}


@pytest.fixture(scope="module")
def no_token_twice(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Rows of 256 unlike tokens: like ones are equally long in the first layer, but for the rounding of their rotation."""
    random = numpy.random.default_rng(5)
    return written(tmp_path_factory.mktemp("unlike"), numpy.stack([random.permutation(256) for _ in range(60)]))


@pytest.fixture(scope="module")
def no_dense_layer(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, no_token_twice: list[str]) -> Run:
    return run(tmp_path_factory.mktemp("edges"), *WITH_EDGES, "--load", str(checkpoint), *START, data=no_token_twice)


@pytest.mark.parametrize("layout", some_slow(EDGES, {"TP2·CP2"}))
def test_losses_equal_those_of_one_process_without_a_dense_layer(
    layout: str, tmp_path: Path, checkpoint: Path, no_token_twice: list[str], no_dense_layer: Run
) -> None:
    """The first and last layers have a budget of their own."""
    ranks, arguments = EDGES[layout]
    start = [*WITH_EDGES, "--load", str(checkpoint), *START, *arguments.split()]
    assert_same(run(tmp_path, *start, ranks=ranks, data=no_token_twice), no_dense_layer)


def test_the_rotary_position_of_rows_counts(tmp_path: Path, checkpoint: Path, one_process: Run) -> None:
    """Else the parity above, of rows at their window's last token, could hold of the mean as well."""
    mean = run(tmp_path, "--attention", "lighthouse", "--lighthouse-rope", "mean", "--load", str(checkpoint), *START)
    assert abs(mean.losses[1] - one_process.losses[1]) > 1e-4
    assert "--lighthouse-rope mean is taken for a new run, and not last" in mean.log


def test_a_resumed_run_goes_on_as_its_checkpoint_was_trained(tmp_path: Path) -> None:
    """By its own argument, whatever the command line says; and it hands that on."""
    run(tmp_path, "--attention", "lighthouse", "--lighthouse-rope", "mean", *SAVE)
    whole = run(tmp_path / "whole", "--attention", "lighthouse", "--lighthouse-rope", "mean")
    load = ["--attention", "lighthouse", "--load", str(tmp_path / "checkpoint")]
    resumed = run(tmp_path / "resumed", *load, "--lighthouse-rope", "last")
    assert_close(resumed.losses[3], whole.losses[3], "parallel loss")
    assert resumed.log.count("--lighthouse-rope mean is taken: the checkpoint") == 1


@pytest.fixture(scope="module")
def unevenly_masked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every third row of 256 tokens counts none in its outer quarters, which are one rank's of two; every third counts none."""
    random, end = numpy.random.default_rng(5), 256
    rows = random.integers(32, 127, (60, 256))
    rows[0::3, :64] = rows[0::3, 192:] = end
    rows[1::3, ::7] = end
    rows[2::3, :] = end
    return [*written(tmp_path_factory.mktemp("masked"), rows), "--eod-mask-loss"]


@pytest.fixture(scope="module")
def one_process_masked(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, unevenly_masked: list[str]
) -> Callable[[str], Run]:
    @cache
    def with_options(options: str) -> Run:
        start = ["--attention", "lighthouse", *options.split(), "--load", str(checkpoint), *START]
        return run(tmp_path_factory.mktemp("one"), *start, data=unevenly_masked)

    return with_options


@pytest.mark.parametrize("layout", some_slow(MASKED, {"CP2", "PP2·CP2", "DP2·CP2", "CP2, dense", "CP2, per token"}))
def test_losses_equal_those_of_one_process_where_tokens_do_not_count(
    layout: str, tmp_path: Path, checkpoint: Path, unevenly_masked: list[str], one_process_masked: Callable[[str], Run]
) -> None:
    """On ranks and in micro-batches that count different numbers of tokens, or none."""
    ranks, arguments = MASKED[layout]
    start = ["--attention", "lighthouse", *arguments.split(), "--load", str(checkpoint), *START]
    result = run(tmp_path, *start, ranks=ranks, data=unevenly_masked)
    assert_same(result, one_process_masked(" ".join(option for option in PER_RUN if option in arguments)))


def test_dense_differs(tmp_path: Path, checkpoint: Path, one_process: Run) -> None:
    """Else the parity above could hold because Lighthouse did nothing."""
    dense = run(tmp_path, "--attention", "dense", "--load", str(checkpoint), *START).losses
    assert abs(dense[1] - one_process.losses[1]) > 1e-3


EXPERTS = """
    --num-experts 4 --moe-router-topk 2 --moe-layer-freq [0,1,0,1] --moe-ffn-hidden-size 64
    --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
""".split()


@pytest.fixture(scope="module")
def of_experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Run]:
    """Words that begin a block spec of unlike layers, and its run on one process."""
    folder, model = tmp_path_factory.mktemp("experts"), ["--attention", "lighthouse", *EXPERTS]
    checkpoint = str(folder / "checkpoint")
    run(folder / "start", *model, "--train-iters", "1", "--save", checkpoint, "--save-interval", "1")
    words = [*model, "--load", checkpoint, *START]
    return words, run(folder / "one", *words)


@pytest.mark.parametrize("layout", some_slow(("TP2+SP", "PP2"), {"PP2"}))
def test_layers_of_experts(layout: str, tmp_path: Path, of_experts: tuple[list[str], Run]) -> None:
    """Split by tensors, and split by layers."""
    (words, one), (ranks, arguments) = of_experts, LAYOUTS[layout]
    losses = run(tmp_path, *words, *arguments.split(), ranks=ranks).losses
    assert_close(list(losses.values()), list(one.losses.values()), "parallel loss")


def test_kernels_and_reference_train_alike(tmp_path: Path) -> None:
    """In fp32; on a CPU under Triton's interpreter (see tests/conftest.py), so two steps of one sequence and one such layer."""
    start = ["--attention", "lighthouse", "--num-layers", "3", "--exit-interval", "2", "--global-batch-size", "1"]
    reference, kernels = (run(tmp_path / steps, *start, "--lighthouse-steps", steps) for steps in ("reference", "kernels"))
    assert list(kernels.losses) == [1, 2]
    assert_same(kernels, reference)
