"""Hybrid models over packed documents: each is as if it were alone, and a GPT's layers named one by one are that GPT."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.mcore.command_line.hybrid import upstream_problem
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.sequence.documents import Documents
from tests.mcore import harness
from tests.mcore.harness import Run, some_slow, without
from tests.mcore.test_documents import LIGHTHOUSE, MODEL_OF_DOCUMENTS, checkpoint, documents, one_lighthouse, one_process
from tests.mcore.test_hybrid import PATTERN
from tests.mcore.test_parity import START, assert_same
from tests.mcore.test_spec import transformer_config
from tests.tolerances import assert_close

__all__ = ["checkpoint", "documents", "one_lighthouse", "one_process"]

run = partial(harness.run, model=without(MODEL_OF_DOCUMENTS, "--num-layers"), module="megatron_lighthouse.pretrain_hybrid")
LAYOUTS = {
    "TP2+SP": (2, PATTERN, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2, two rows at once": (
        2,
        ["--hybrid-layer-pattern", "*-*-|*-*-"],
        "--pipeline-model-parallel-size 2 --micro-batch-size 2 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
    "CP2": (2, PATTERN, "--context-parallel-size 2"),
}


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, {"TP2+SP", "CP2"}))
def test_it_is_the_gpt_over_the_same_documents(
    layout: str, tmp_path: Path, checkpoint: Path, documents: list[str], one_lighthouse: Run
) -> None:
    """From the GPT's checkpoint; of the four attention layers the middle two are Lighthouse."""
    ranks, pattern, words = LAYOUTS[layout]
    start = [*LIGHTHOUSE, "--load", str(checkpoint), *START]
    assert_same(run(tmp_path, *start, *pattern, *words.split(), ranks=ranks, data=documents), one_lighthouse)


N, ROWS = 64, ([30, 1, 33], [7, 57])


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("selects", [False, True], ids=["dense", "lighthouse"])
def test_each_document_is_as_if_alone(selects: bool) -> None:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_lighthouse.mcore.attention.document_rotary import rotate_by
    from megatron_lighthouse.mcore.attention.layer_specs import hybrid_spec
    from megatron_lighthouse.mcore.attention.packed import packed
    from megatron_lighthouse.mcore.loop import hooks

    pattern = "*-*-"
    small = LighthouseConfig(budget=2, tile_budget=2)
    settings = LighthouseSettings(small, dense_first=1, dense_last=0, rope="mean") if selects else None
    config = transformer_config(num_layers=len(pattern), transformer_impl="local")
    config.hybrid_layer_pattern = pattern
    hooks.stack_locally()
    spec = hybrid_spec(SimpleNamespace(transformer=config), settings=settings, documents=True)
    how = {"vocab_size": 64, "max_sequence_length": N, "hybrid_layer_pattern": pattern, "position_embedding_type": "rope"}
    model = HybridModel(config, spec, **how).double().eval()
    tokens = torch.randint(64, (2, N), generator=torch.Generator().manual_seed(3))

    def forward(part: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        found = Documents.of(bounds, part.numel())
        positions = found.positions.view(part.shape)
        rotate_by(model, positions)
        out: torch.Tensor = model(part, positions, None, packed_seq_params=packed(found, part.shape[1], None, positions))
        return out

    whole = forward(tokens, [*ROWS[0], *ROWS[1]])
    for row, out, lengths in zip(tokens, whole, ROWS, strict=True):
        for part, of in zip(row.split(lengths), out.split(lengths), strict=True):
            assert_close(of, forward(part.unsqueeze(0), [len(part)])[0], "float64")


def test_upstreams_script_is_refused() -> None:
    assert upstream_problem(Namespace()) is None
    said = upstream_problem(Namespace(dataloader_inter_document_masking=True))
    assert said is not None
    assert "use python -m megatron_lighthouse.pretrain_hybrid" in said
