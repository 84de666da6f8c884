"""Models that are trained at long context, tiny: the same losses at any layout, from one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.mcore.harness import MODEL, Run, run, some_slow
from tests.mcore.test_parity import START, assert_same

MODELS = {
    # the second layer is dense and the fourth Lighthouse; a window is longer than a chunk of two ranks
    "gpt-oss": "--window-size 100,0 --window-attn-skip-freq 2 --softmax-type learnable --lighthouse-dense-last 0",
    # values of a width of their own, and two heads a selection
    "deepseek": """
        --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 12
        --rope-type yarn --rotary-scaling-factor 4 --mscale-all-dim 1.0
        --lighthouse-heads-per-selection 2 --qk-layernorm
    """,
}
LAYOUTS = {
    "TP2+SP": "--tensor-model-parallel-size 2 --sequence-parallel",
    "PP2": "--pipeline-model-parallel-size 2",
    "CP2, recompute": "--context-parallel-size 2 --recompute-granularity selective --recompute-modules core_attn",
    "DP2": "--use-distributed-optimizer",
}

GROUPS = MODEL.index("--group-query-attention")
UNGROUPED = [*MODEL[:GROUPS], *MODEL[GROUPS + 3 :]]
"""MLA has keys for each head, and Megatron refuses groups beside it."""
BASES = {"gpt-oss": MODEL, "deepseek": UNGROUPED}

type Start = Callable[[str], tuple[list[str], Run]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Arguments by which a model goes on from weights of its own, and the run of one process that does."""

    @cache
    def of(name: str) -> tuple[list[str], Run]:
        own, folder = ["--attention", "lighthouse", *MODELS[name].split()], tmp_path_factory.mktemp("model")
        checkpoint = str(folder / "checkpoint")
        run(folder / "start", *own, "--train-iters", "1", "--save", checkpoint, "--save-interval", "1", model=BASES[name])
        arguments = [*own, "--load", checkpoint, *START]
        return arguments, run(folder / "one", *arguments, model=BASES[name])

    return of


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, {"PP2", "DP2", "TP2+SP"}))
@pytest.mark.parametrize("name", MODELS)
def test_losses_equal_those_of_one_process(name: str, layout: str, tmp_path: Path, start: Start) -> None:
    arguments, one_process = start(name)
    assert_same(run(tmp_path, *arguments, *LAYOUTS[layout].split(), ranks=2, model=BASES[name]), one_process)


def test_windows_and_sinks_count(tmp_path: Path, start: Start) -> None:
    """Else the parity above could hold of a model without them."""
    arguments, one_process = start("gpt-oss")
    without = [word for word in arguments if word not in ("--window-size", "100,0")]
    assert abs(run(tmp_path, *without, "--train-iters", "1").losses[1] - one_process.losses[1]) > 1e-3
