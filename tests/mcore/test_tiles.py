"""The loss and the MLPs in tiles: the losses and gradients of the whole, from what is computed of no more than a tile."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from megatron_lighthouse.mcore.command_line.tiles import problems, tile_tokens
from tests.mcore.harness import Run, run
from tests.mcore.test_parity import START, assert_same
from tests.tolerances import assert_close

if TYPE_CHECKING:
    from megatron_lighthouse.mcore.loop.tiled_loss import Logits

TILES = "--loss-tile-tokens 48 --mlp-tile-tokens 40".split()
"""No divisors of the 256 tokens."""


class Layer(torch.nn.Module):
    """An output layer that remembers how many tokens it was given at once."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(40, 16, dtype=dtype))
        self.gradient_accumulation_fusion = True
        self.seen: list[int] = []

    def forward(self, hidden: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        assert not self.gradient_accumulation_fusion, "its gradient would be added to main_grad, unscaled"
        self.seen.append(hidden.shape[0] * hidden.shape[1])
        return linear(hidden, self.weight if weight is None else weight), None


def losses(labels: Tensor, logits: Tensor) -> Tensor:
    return cross_entropy(logits.double().permute(1, 2, 0), labels, reduction="none")


def logits_of(hidden: Tensor, layer: Layer, tokens: int) -> Logits:
    from megatron_lighthouse.mcore.loop.tiled_loss import Logits, Output

    return Logits(hidden, layer.weight, Output(layer, lambda x: 0.5 * x, tokens))


MASK = "masked, whatever was expected"
KINDS = {
    "as expected": (1.0, 1),
    "scaled": (1 / 3, 1),
    "of no weight": (0.0, 1),
    MASK: (None, 2),
}
"""By what the weights that come differ from those that were expected; and how many passes over the tiles that takes."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "batch", "tokens"), [(50, 1, 7), (33, 3, 20), (8, 2, 1), (5, 1, 100)])
def test_tiles_give_the_loss_and_gradients_of_the_whole(rows: int, batch: int, tokens: int, kind: str) -> None:
    torch.manual_seed(0)
    layer = Layer(torch.float64)
    hidden = torch.randn(rows, batch, 16, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(40, (batch, rows)), torch.rand(batch, rows)
    factor, passes = KINDS[kind]
    summed_by = torch.rand(batch, rows) if factor is None else weights * factor
    whole = losses(labels, 0.5 * linear(hidden, layer.weight))
    expected = torch.autograd.grad((whole * summed_by).sum(), [hidden, layer.weight])
    for first in (True, False):
        layer.seen.clear()
        tiled = logits_of(hidden, layer, tokens).loss(labels, losses, weights)
        assert_close(tiled, whole, "float64")
        for again in (True, False):  # backward twice over the same graph
            found = torch.autograd.grad((tiled * summed_by).sum(), [hidden, layer.weight], retain_graph=again)
            if again:
                assert sum(layer.seen) == passes * rows * batch
                assert not first or max(layer.seen) <= max(tokens, batch)
            for one, other in zip(found, expected, strict=True):
                assert_close(one, other, "float32")  # weights and a factor of fp32
    assert layer.gradient_accumulation_fusion


def test_without_gradients_there_is_one_pass() -> None:
    layer, hidden, labels = Layer(torch.float64), torch.randn(30, 1, 16, dtype=torch.float64), torch.randint(40, (1, 30))
    with torch.no_grad():
        found = logits_of(hidden, layer, 7).loss(labels, losses, torch.ones(1, 30))
    assert_close(found, losses(labels, 0.5 * linear(hidden, layer.weight)), "float64")
    assert sum(layer.seen) == 30
    layer.requires_grad_(False)
    hidden.requires_grad_()
    loss = logits_of(hidden, layer, 7).loss(labels, losses, torch.ones(1, 30))
    loss.sum().backward()
    assert layer.weight.grad is None
    assert hidden.grad is not None


def test_gradients_of_the_weight_are_rounded_once() -> None:
    """Sums of bf16 tiles in bf16 would lie further off than one rounding of the sum of what each tile gave."""
    torch.manual_seed(0)
    layer = Layer(torch.bfloat16)
    hidden, labels = torch.randn(512, 1, 16, dtype=torch.bfloat16), torch.randint(40, (1, 512))
    logits_of(hidden, layer, 8).loss(labels, losses, torch.ones(1, 512)).sum().backward()
    parts = torch.zeros(40, 16)
    for rows, wanted in zip(hidden.split(8), labels.split(8, dim=1), strict=True):
        loss = losses(wanted, 0.5 * linear(rows, layer.weight)).sum()
        parts += torch.autograd.grad(loss, layer.weight)[0].float()
    assert torch.equal(layer.weight.grad, parts.bfloat16())


def test_fp16_waits_for_the_scale_of_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    """Gradients of a mean over many tokens are below what fp16 holds, until they are scaled. The log says what that costs."""
    torch.manual_seed(0)
    layer, hidden = Layer(torch.float16), torch.randn(64, 1, 16, dtype=torch.float16)
    labels, weights = torch.randint(40, (1, 64)), torch.full((1, 64), 1e-9)
    (logits_of(hidden, layer, 8).loss(labels, losses, weights) * weights * 2**30).sum().backward()
    (expected,) = torch.autograd.grad(losses(labels, 0.5 * linear(hidden, layer.weight)).sum() * 1e-9 * 2**30, layer.weight)
    assert_close(layer.weight.grad, expected, "float16")
    assert [x for x in caplog.messages if "in fp16 tiles of logits are computed twice" in x] == caplog.messages != []


def test_a_mask_that_came_too_late_is_of_another_shape() -> None:
    from megatron_lighthouse.mcore.loop import loss_weights

    labels, mask = torch.zeros(2, 5, dtype=torch.long), torch.rand(2, 5)
    with loss_weights.weighted(torch.rand(2, 7)):
        assert torch.equal(loss_weights.expected(labels, mask), mask)
    with loss_weights.weighted(2 * mask):
        loss_weights.rolled(lambda x: (x + 1, None), mask)
        assert torch.equal(loss_weights.expected(labels, mask), mask + 1)
        assert torch.equal(loss_weights.expected(labels, mask), 2 * mask)
    assert torch.equal(loss_weights.expected(labels, None), torch.ones(2, 5))


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


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_in_tiles_keeps_no_more_than_its_input(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    from megatron_lighthouse.mcore.loop import tiled_mlp

    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=24, add_bias_linear=bias, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, params_dtype=torch.float64, gradient_accumulation_fusion=False,
    )  # fmt: skip
    mlp = MLP(config, MLPSubmodules(ColumnParallelLinear, RowParallelLinear), ffn_hidden_size=24)
    hidden = torch.randn(37, 2, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(37, 2, 16, dtype=torch.float64)
    runs = []
    for tokens in (0, 10):
        monkeypatch.setattr(tiled_mlp, "global_args", lambda tokens=tokens: SimpleNamespace(mlp_tile_tokens=tokens))
        kept: list[int] = []
        given: list[Tensor] = []

        def inner(mlp: MLP, part: Tensor, given: list[Tensor] = given) -> tuple[Tensor, Tensor | None]:
            given.append(part)
            return MLP.forward(mlp, part)

        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            output, of_bias = tiled_mlp.forward(inner, mlp, hidden)
        assert len({part.grad_fn for part in given}) == 1  # else every part has a gradient as large as the whole
        loss = (output * weights).sum() + (0 if of_bias is None else of_bias.square().sum())
        runs.append((output, *torch.autograd.grad(loss, [hidden, *mlp.parameters()])))
        assert (max(kept) > 2 * 37 * 16) == (tokens == 0)
    for whole, tiled in zip(*runs, strict=True):
        assert_close(tiled, whole, "float64")


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("tied", [False, True])
def test_a_models_loss_in_tiles_has_the_gradients_of_the_whole(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied weights have two: of the embedding, and of the tiles."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_lighthouse.mcore.loop import tiled_loss

    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True, init_method_std=0.5,
        gradient_accumulation_fusion=False, attention_dropout=0.0, hidden_dropout=0.0, bias_dropout_fusion=False,
        masked_softmax_fusion=False, transformer_impl="local",
    )  # fmt: skip
    spec = get_gpt_layer_local_spec()
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=40, share_embeddings_and_output_weights=tied)
    tokens, labels = torch.randint(64, (2, 1, 40))
    found = []
    for tile in (0, 7):
        monkeypatch.setattr(tiled_loss, "global_args", lambda tile=tile: SimpleNamespace(loss_tile_tokens=tile))
        loss = tiled_loss.forward(GPTModel.forward, model, tokens, torch.arange(40)[None], None, labels=labels)
        found.append((loss, *torch.autograd.grad(loss.mean(), [*model.parameters()])))
    assert ("output_layer.weight" in dict(model.named_parameters())) is not tied
    for whole, tiled in zip(*found, strict=True):
        assert_close(tiled, whole, "float32")


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
        pytest.param(MTP, 1, "", marks=pytest.mark.slow),
        (MTP, 2, "--tensor-model-parallel-size 2"),
        ([], 2, "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 2"),
        pytest.param([], 2, "--context-parallel-size 2", marks=pytest.mark.slow),
    ],
    ids=["multi-token prediction", "multi-token prediction, TP2", "TP2+SP, two rows at once", "CP2"],
)
def test_training_in_tiles_is_training(model: list[str], ranks: int, layout: str, start: Callable[..., Run]) -> None:
    result = start(*model, *TILES, *layout.split(), ranks=ranks)
    assert_same(result, start(*model))
    assert not model or "mtp_1 loss" in result.log
    assert not model or "validation loss at iteration 2" in result.log


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_tile_tokens": -1}, "--loss-tile-tokens -1 must be at least 0"),
        ({"mlp_tile_tokens": -8}, "--mlp-tile-tokens -8 must be at least 0"),
        (
            {"loss_tile_tokens": 64, "defer_embedding_wgrad_compute": True},
            "--loss-tile-tokens 64 with --defer-embedding-wgrad-compute",
        ),
        ({"loss_tile_tokens": 64, "use_torch_fsdp2": True}, "--loss-tile-tokens 64 with --use-torch-fsdp2, which shards"),
        ({"mlp_tile_tokens": 64, "fp8": "hybrid"}, "--mlp-tile-tokens 64 with --fp8-format hybrid: its scales"),
        ({"mlp_tile_tokens": 64, "cuda_graph_impl": "local"}, "--mlp-tile-tokens 64 with --cuda-graph-impl"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], message: str) -> None:
    plain = {"loss_tile_tokens": None, "mlp_tile_tokens": 0, "cuda_graph_impl": "none", "fp8": None}
    (problem,) = problems(Namespace(**{**plain, **given}))
    assert problem.startswith(message)
    assert not [*problems(Namespace(**plain))]
