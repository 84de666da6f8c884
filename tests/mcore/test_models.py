"""Models that are trained at long context, tiny: the same losses at any layout, from one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest

from tests.mcore.harness import MODEL, Run, run, some_slow, without
from tests.mcore.test_parity import START, assert_same

LATENT = """
    --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 12
    --rope-type yarn --rotary-scaling-factor 4 --mscale-all-dim 1.0 --lighthouse-heads-per-selection 2 --qk-layernorm
"""
"""Values of a width of their own, and two heads a selection."""
UNGROUPED = without(MODEL, "--group-query-attention", "--num-query-groups")
"""MLA has keys for each head, and Megatron refuses groups beside it."""


@dataclass(frozen=True)
class Model:
    """What is trained, by which entry point."""

    words: str
    base: Sequence[str] = tuple(MODEL)
    module: str = "megatron_lighthouse.pretrain_gpt"
    scorer: str = "norm"
    """The one that the model asks for."""


MODELS = {
    # the second layer is dense and the fourth Lighthouse; a window is longer than a chunk of two ranks
    "gpt-oss": Model("--window-size 100,0 --window-attn-skip-freq 2 --softmax-type learnable --lighthouse-dense-last 0"),
    "deepseek": Model(LATENT, UNGROUPED),
    # grouped queries; two tiles in four chunks, so that ranks exchange what they score by
    "qwen3": Model("--qk-layernorm", scorer="mass"),
    # queries that are projected at once
    "deepseek-lite": Model(" ".join(without(LATENT.split(), "--q-lora-rank", "--qk-layernorm")), UNGROUPED),
    "hybrid of latent layers": Model(
        f"{LATENT} --hybrid-layer-pattern +-+-+-+-", without(UNGROUPED, "--num-layers"), "megatron_lighthouse.pretrain_hybrid"
    ),
}
LAYOUTS = {
    "TP2+SP": "--tensor-model-parallel-size 2 --sequence-parallel",
    "PP2": "--pipeline-model-parallel-size 2",
    "CP2, recompute": "--context-parallel-size 2 --recompute-granularity selective --recompute-modules core_attn",
    "DP2, recompute full": """
        --use-distributed-optimizer --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    """,
}

type Start = Callable[[str], tuple[Callable[..., Run], Run]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """How a model goes on from weights of its own, and the run of one process that does."""

    @cache
    def of(name: str) -> tuple[Callable[..., Run], Run]:
        model, folder = MODELS[name], tmp_path_factory.mktemp("model")
        own = ["--attention", "lighthouse", *model.words.split()]
        train, checkpoint = partial(run, model=model.base, module=model.module), str(folder / "checkpoint")
        train(folder / "start", *own, "--train-iters", "1", "--save", checkpoint, "--save-interval", "1")

        def goes_on(folder: Path, *words: str, ranks: int = 1, leave_out: str = "") -> Run:
            return train(folder, *without(own, leave_out), "--load", checkpoint, *START, *words, ranks=ranks)

        return goes_on, goes_on(folder / "one")

    return of


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, LAYOUTS.keys() - {"CP2, recompute"}))
@pytest.mark.parametrize("name", some_slow(MODELS, {"deepseek-lite", "hybrid of latent layers"}))
def test_losses_equal_those_of_one_process(name: str, layout: str, tmp_path: Path, start: Start) -> None:
    goes_on, one_process = start(name)
    result = goes_on(tmp_path, *LAYOUTS[layout].split(), ranks=2)
    assert list(result.losses) == [1, 2, 3]
    assert_same(result, one_process)
    assert result.log.count(f"--lighthouse-scorer {MODELS[name].scorer} taken") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_dense_differs(name: str, tmp_path: Path, start: Start) -> None:
    """Else the parity above could hold because Lighthouse did nothing."""
    goes_on, one_process = start(name)
    dense = goes_on(tmp_path, "--attention", "dense", "--train-iters", "1")
    assert abs(dense.losses[1] - one_process.losses[1]) > 1e-3


def test_windows_count(tmp_path: Path, start: Start) -> None:
    """Else the parity above could hold of a model without them."""
    goes_on, one_process = start("gpt-oss")
    without_windows = goes_on(tmp_path, "--train-iters", "1", leave_out="--window-size")
    assert abs(without_windows.losses[1] - one_process.losses[1]) > 1e-3
