"""The loss in tiles: the losses and gradients of the whole, from logits of no more than a tile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from megatron_lighthouse.mcore.command_line.loss_tiles import tile_tokens
from tests.mcore.harness import Run, run
from tests.mcore.test_parity import START, assert_same
from tests.tolerances import assert_close

TILES = "--loss-tile-tokens 48".split()
"""Not a divisor of the 256 tokens."""


class Output(torch.nn.Module):
    """An output layer that remembers how many tokens it was given at once."""

    gradient_accumulation_fusion = False

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(40, 16, dtype=dtype))
        self.seen: list[int] = []

    def forward(self, hidden: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        self.seen.append(hidden.shape[0] * hidden.shape[1])
        return linear(hidden, self.weight if weight is None else weight), None


def losses(labels: Tensor, logits: Tensor) -> Tensor:
    return cross_entropy(logits.double().permute(1, 2, 0), labels, reduction="none")


@pytest.mark.parametrize(("rows", "batch", "tokens"), [(50, 1, 7), (33, 3, 20), (8, 2, 1), (5, 1, 100)])
def test_tiles_give_the_loss_and_gradients_of_the_whole(rows: int, batch: int, tokens: int) -> None:
    from megatron_lighthouse.mcore.loop.tiled_loss import Logits

    torch.manual_seed(0)
    layer, scale = Output(torch.float64), 0.5
    hidden = torch.randn(rows, batch, 16, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(40, (batch, rows)), torch.rand(batch, rows, dtype=torch.float64)
    whole = losses(labels, scale * layer(hidden)[0])
    expected = torch.autograd.grad((whole * weights).sum(), [hidden, layer.weight])
    layer.seen.clear()
    tiled = Logits(hidden, layer, None, lambda x: scale * x, tokens).loss(labels, losses)
    assert_close(tiled, whole, "float64")
    found = torch.autograd.grad((tiled * weights).sum(), [hidden, layer.weight])
    assert max(layer.seen) <= max(tokens, batch)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, "float64")


def test_gradients_of_the_weight_are_rounded_once() -> None:
    """Sums of bf16 tiles in bf16 would lie further off than one rounding of the sum of what each tile gave."""
    from megatron_lighthouse.mcore.loop.tiled_loss import Logits

    torch.manual_seed(0)
    layer = Output(torch.bfloat16)
    hidden, labels = torch.randn(512, 1, 16, dtype=torch.bfloat16), torch.randint(40, (1, 512))
    Logits(hidden, layer, None, None, 8).loss(labels, losses).sum().backward()
    parts = torch.zeros(40, 16)
    for rows, wanted in zip(hidden.split(8), labels.split(8, dim=1), strict=True):
        loss = losses(wanted, linear(rows, layer.weight)).sum()
        parts += torch.autograd.grad(loss, layer.weight)[0].float()
    assert torch.equal(layer.weight.grad, parts.bfloat16())  # the last tile comes first: sums of 64 in fp32, another order


def test_sequence_parallel_ranks_each_have_a_part_of_every_tile() -> None:
    """Two ranks' rows are gathered rank by rank: labels come in that order, losses in the sequence's."""
    from megatron_lighthouse.mcore.loop.tiled_loss import joined, tiles

    labels = torch.arange(2 * 20).view(2, 20)
    hidden = labels.T[:10].unsqueeze(2)  # of the first rank: tokens 0 to 9
    parts = []
    for part, wanted in tiles(hidden, (labels,), 8):
        gathered = torch.cat([part, part + 10])[:, :, 0].T  # the second rank's are ten further on
        assert torch.equal(gathered, wanted)
        parts.append(wanted)
    assert max(part.numel() for part in parts) <= 8
    assert torch.equal(joined(parts, 2), labels)


@pytest.mark.parametrize(
    ("given", "vocabulary", "expected"), [(None, 151936, 1766), (None, 384, 699050), (0, 151936, 0), (64, 384, 64)]
)
def test_tiles_hold_a_gibibyte(given: int | None, vocabulary: int, expected: int) -> None:
    assert tile_tokens(given, vocabulary) == expected


MTP = "--mtp-num-layers 1 --eval-interval 2 --eval-iters 1".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    save = ["--train-iters", "1", "--save", str(folder / "checkpoint"), "--save-interval", "1"]
    run(folder, "--attention", "dense", *MTP, *save)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Callable[..., Run]:
    """Three iterations from one checkpoint; equal ones are run once."""
    begin = ["--attention", "dense", "--load", str(checkpoint), *START]
    return cache(lambda *words, ranks=1: run(tmp_path_factory.mktemp("run"), *begin, *words, ranks=ranks))


@pytest.mark.parametrize(
    ("model", "ranks", "layout"),
    [
        (MTP, 1, ""),
        (MTP, 2, "--tensor-model-parallel-size 2"),
        ([], 2, "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 2"),
    ],
    ids=["multi-token prediction", "multi-token prediction, TP2", "TP2+SP, two rows at once"],
)
def test_training_in_tiles_is_training(model: list[str], ranks: int, layout: str, start: Callable[..., Run]) -> None:
    result = start(*model, *TILES, *layout.split(), ranks=ranks)
    assert_same(result, start(*model))
    assert not model or "mtp_1 loss" in result.log
    assert not model or "validation loss at iteration 2" in result.log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss-tile-tokens -1", "--loss-tile-tokens -1 must be at least 0"),
        (
            "--loss-tile-tokens 64 --defer-embedding-wgrad-compute",
            "--loss-tile-tokens 64 with --defer-embedding-wgrad-compute",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments: str, message: str) -> None:
    from megatron_lighthouse.mcore.command_line.loss_tiles import problems

    words = arguments.split()
    args = SimpleNamespace(loss_tile_tokens=int(words[1]), defer_embedding_wgrad_compute=len(words) > 2)
    (problem,) = problems(args)
    assert problem.startswith(message)
