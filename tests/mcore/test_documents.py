"""Packed documents through the entry point: the losses of one process at any layout, and those of each document alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron_lighthouse.plots import read_scalars
from tests.mcore import harness
from tests.mcore.harness import MODEL, ROOT, Run, some_slow, without
from tests.mcore.test_checkpoints import save_interval
from tests.mcore.test_parity import START, assert_same
from tests.mcore.test_resume import tensors
from tests.mcore.test_wall import LOGGED, half_lives
from tests.tolerances import assert_close

AT = MODEL.index("--lighthouse-budget")
MODEL_OF_DOCUMENTS = MODEL[:AT] + MODEL[AT + 2 :]
"""Without a budget of one sequence, which is refused where rows hold documents."""
run = partial(harness.run, model=MODEL_OF_DOCUMENTS)

PACKED = "--attention dense --dataloader-inter-document-masking --eod-mask-loss --lr 1e-3".split()
TOKENS = "--tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 256 --padded-vocab-size 384".split()

LAYOUTS = {
    "two rows at once": (1, "--micro-batch-size 2"),
    "CP2, all-gather and all-to-all by layer": (2, "--context-parallel-size 2 --cp-comm-type p2p all_gather a2a p2p"),
    "TP2·CP2, two rows at once": (
        4,
        "--tensor-model-parallel-size 2 --context-parallel-size 2 --sequence-parallel --micro-batch-size 2 "
        "--eval-interval 2 --eval-iters 2 --eval-micro-batch-size 1",
    ),
    "PP4, two rows at once": (4, "--pipeline-model-parallel-size 4 --micro-batch-size 2"),
    "PP2·VPP2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "DP2, recompute": (2, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
}
"""DP2 counts unequal numbers of tokens, for the ends of documents do not count."""
SELECTED = ("two rows at once", "CP2, all-gather and all-to-all by layer", "TP2·CP2, two rows at once")
"""Layouts that Lighthouse is tried at over the same documents."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Documents of 2 to 400 tokens, many of which are shorter than the chunks of a rank: the words that name them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    text = numpy.frombuffer((ROOT / "LICENSE").read_bytes(), numpy.uint8)
    prefix = str(tmp_path_factory.mktemp("documents") / "text")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for i, length in enumerate((3, 70, 2, 2, 400, 33, 5, 121, 2, 18) * 6):
        builder.add_document(numpy.append(text[170 * i :][: length - 1], 256).astype(numpy.uint16), [length])
    builder.finalize(f"{prefix}.idx")
    return ["--train-data-path", prefix, "--valid-data-path", prefix, *TOKENS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """Weights that every run starts from."""
    folder = tmp_path_factory.mktemp("start")
    save = ["--train-iters", "1", "--save", str(folder / "checkpoint"), "--save-interval", "1"]
    run(folder, *PACKED, *save, data=documents)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, documents: list[str]) -> Run:
    return run(tmp_path_factory.mktemp("one"), *PACKED, "--load", str(checkpoint), *START, data=documents)


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, {"PP2·VPP2", *SELECTED}))
def test_losses_equal_those_of_one_process(
    layout: str, tmp_path: Path, checkpoint: Path, documents: list[str], one_process: Run
) -> None:
    ranks, arguments = LAYOUTS[layout]
    start = [*PACKED, "--load", str(checkpoint), *START, *arguments.split()]
    result = run(tmp_path, *start, ranks=ranks, data=documents)
    assert list(result.losses) == [1, 2, 3]
    assert result.log.count("attention's work goes by the lengths of documents") == 1
    assert ("2 data-parallel ranks have other documents each" in result.log) == ("DP2" in layout)
    assert_same(result, one_process)


LIGHTHOUSE = ["--attention", "lighthouse", *PACKED[2:], "--lighthouse-tile-budget", "2"]
"""Windows of 16 tokens, tiles of 128: longer documents select, those of few tokens go in whole."""
WATCHED = "--lighthouse-telemetry-interval 1 --lighthouse-selection-map map.png"


@pytest.fixture(scope="module")
def one_lighthouse(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, documents: list[str]) -> Run:
    start = [*LIGHTHOUSE, *WATCHED.split(), "--load", str(checkpoint), *START]
    return run(tmp_path_factory.mktemp("selects"), *start, data=documents)


WITH_CP2 = "CP2, all-gather and all-to-all by layer"
SELECTS = {
    "two rows at once, outputs kept": (1, "--micro-batch-size 2 --no-lighthouse-discard-output"),
    "TP2·PP2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
    WITH_CP2: (2, f"{LAYOUTS[WITH_CP2][1]} {WATCHED}"),
    "TP2·CP2, two rows at once": LAYOUTS["TP2·CP2, two rows at once"],
}


@pytest.mark.parametrize("layout", some_slow(SELECTS, {"TP2·PP2"}))
def test_lighthouse_equals_itself_on_one_process(
    layout: str, tmp_path: Path, checkpoint: Path, documents: list[str], one_lighthouse: Run, one_process: Run
) -> None:
    ranks, arguments = SELECTS[layout]
    assert abs(one_lighthouse.losses[1] - one_process.losses[1]) > 1e-4, "nothing was selected"
    start = [*LIGHTHOUSE, "--load", str(checkpoint), *START, *arguments.split()]
    result = run(tmp_path, *start, ranks=ranks, data=documents)
    assert_same(result, one_lighthouse)
    if WATCHED in arguments:
        logged, expected = (selection_of(x) for x in (result, one_lighthouse))
        assert {step for steps, _ in expected.values() for step in steps} == {1, 2, 3}
        for name, (steps, values) in expected.items():
            assert (logged[name][0] == steps).all()
            assert_close(logged[name][1], values, "float32")
        assert all((x.folder / "map.png").read_bytes().startswith(b"\x89PNG") for x in (result, one_lighthouse))


def test_wall_over_ranks_equals_itself_on_one_process(tmp_path: Path, documents: list[str]) -> None:
    """With gates that matter at these lengths, and two rows at once."""
    options = "--position-embedding-type none --wall-gate-bias 3 --micro-batch-size 2 --train-iters 4".split()
    wall, saved = ["--attention", "wall", *PACKED[2:], *options, *LOGGED], tmp_path / "checkpoint"
    one = run(tmp_path / "one", *wall, *save_interval(saved, 1), data=documents)
    two = run(
        tmp_path / "two",
        *(*wall, "--context-parallel-size", "2", "--load", str(saved), "--ckpt-step", "1"),
        ranks=2,
        data=documents,
    )
    assert list(two.losses) == [2, 3, 4]
    later = ({i: x[i] for i in two.losses} for x in (one.losses, one.gradient_norms))
    assert_same(two, Run(*later, one.log, one.folder))
    lives, expected = (half_lives(x, 4) for x in (two, one))
    assert expected
    assert_close([lives[name] for name in expected], [*expected.values()], "parallel half-life")


def selection_of(result: Run) -> dict[str, Any]:
    """What was logged of the first Lighthouse layer, by name."""
    logged = read_scalars(result.folder / "tensorboard")
    return {name: found for name, found in logged.items() if name.startswith("lighthouse/") and "layer-2" in name}


FURTHER = "--mtp-num-layers 1 --train-iters 2 --eval-interval 2 --eval-iters 1".split()


def test_further_tokens_are_predicted_alike_on_two_ranks(tmp_path: Path, documents: list[str]) -> None:
    one, two = (run(tmp_path / f"{ranks}", *PACKED, *FURTHER, ranks=ranks, data=documents) for ranks in (1, 2))
    assert "validation loss at iteration 2" in one.log
    assert len(further(one.log)) == 2
    assert_close([*one.losses.values(), *further(one.log)], [*two.losses.values(), *further(two.log)], "parallel loss")


def test_further_tokens_are_predicted_alike_under_sequence_parallelism(tmp_path: Path, documents: list[str]) -> None:
    """Where Megatron's norms of these layers would be torch's, which refuse it."""
    saved, words = tmp_path / "checkpoint", [*PACKED, *FURTHER, "--train-iters", "3"]
    one = run(tmp_path / "one", *words, *save_interval(saved, 1), data=documents)
    parallel = "--tensor-model-parallel-size 2 --sequence-parallel --ckpt-step 1 --load".split()
    two = run(tmp_path / "two", *words, *parallel, str(saved), ranks=2, data=documents)
    assert list(two.losses) == [2, 3]
    for name in ("lm loss", "mtp_1 loss"):
        logged, expected = (read_scalars(x.folder / "tensorboard")[name][1] for x in (two, one))
        assert_close([*logged], [*expected[1:]], "parallel loss")


LATENT = """
    --multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 12 --rope-type rope
    --softmax-type learnable --optimizer sgd --sgd-momentum 0 --lr 1
"""


@pytest.mark.parametrize("own", [[], PACKED[2:4]], ids=["one sequence", "documents"])
def test_layers_of_further_tokens_learn_from_all_heads(own: list[str], tmp_path: Path, documents: list[str]) -> None:
    """Keys' rotated channels, which the heads of tensor-parallel ranks share, and sinks, of which each rank has its own."""
    model = without(MODEL_OF_DOCUMENTS, "--group-query-attention", "--num-query-groups")
    words = [*PACKED[:2], *own, *FURTHER, *LATENT.split(), "--eval-iters", "0"]
    train = partial(harness.run, model=model, data=documents)
    saved, later = tmp_path / "checkpoint", tmp_path / "later"
    one = train(tmp_path / "one", *words, *save_interval(saved, 1))
    parallel = "--tensor-model-parallel-size 2 --sequence-parallel --no-load-optim --ckpt-step 1 --load".split()
    two = train(tmp_path / "two", *words, *parallel, str(saved), *save_interval(later, 2), ranks=2)
    assert_close(two.gradient_norms[2], one.gradient_norms[2], "parallel gradient norm")
    before, expected, found = tensors(saved, 1), tensors(saved, 2), tensors(later, 2)
    names = [name for name in expected if name.startswith("mtp.")]
    assert any("softmax_offset" in name for name in names)
    for name in names:
        assert_close(found[name] - before[name], expected[name] - before[name], "float32")
        assert not torch.equal(expected[name], before[name])


def further(log: str) -> list[float]:
    """The losses of a further token that were logged."""
    return [float(line.split("mtp_1 loss: ")[1].split("|")[0]) for line in log.splitlines() if "mtp_1 loss: " in line]
