"""MLA over packed documents: each is as if it were alone in the row, on one process and on several."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.sequence.documents import Documents
from tests.mcore import harness
from tests.mcore.harness import without
from tests.mcore.test_documents import LIGHTHOUSE, documents
from tests.mcore.test_latent import LATENT, N, built, latent
from tests.mcore.test_models import MODELS
from tests.mcore.test_parity import START, assert_same
from tests.mcore.test_spec import local_spec
from tests.tolerances import assert_close

__all__ = ["documents"]
pytestmark = pytest.mark.usefixtures("megatron")

ROWS = ([30, 1, 33], [7, 57])
"""Lengths of the documents of two rows of N tokens."""


class Engine(torch.nn.Module):
    """In place of Transformer Engine's attention: takes and asserts what Megatron's class over it does of 'thd'."""

    def __init__(self, config: Any, *given: Any, softmax_scale: float | None = None, **named: Any) -> None:
        super().__init__()
        self.softmax_scale, self.config = softmax_scale, config
        self.hidden_size_per_attention_head_v = named.get("v_channels") or config.kv_channels

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: None, *, packed_seq_params: Any, **named: Any) -> Tensor:
        assert (packed_seq_params.qkv_format, mask) == ("thd", None)
        ATTENDED.append(self.config)
        assert v.shape[-1] == self.hidden_size_per_attention_head_v == q.shape[-1], "no kernel of 'thd' has two widths"
        attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, scale=self.softmax_scale)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*part) for part in parts], 1).transpose(0, 1).flatten(1)


ATTENDED: list[Any] = []
"""The config of each call's layer."""
Engine.__module__ = "transformer_engine.stand_in"
BY_ENGINE = "transformer_engine"


@pytest.mark.parametrize(("rope_type", "by"), [("rope", "local"), ("yarn", "local"), ("rope", BY_ENGINE)])
@pytest.mark.parametrize("settings", [None, LATENT], ids=["dense", "lighthouse"])
def test_each_document_is_as_if_alone(rope_type: str, by: str, settings: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.models import gpt

    from megatron_lighthouse.mcore.attention.document_rotary import rotate_by
    from megatron_lighthouse.mcore.attention.layer_specs import layer_spec
    from megatron_lighthouse.mcore.attention.packed import packed

    model_cfg = latent(rope_type=rope_type, v_head_dim=6 if by == BY_ENGINE else 12)
    if by == BY_ENGINE:
        spec = local_spec(multi_latent_attention=True)
        spec.submodules.self_attention.submodules.core_attention = Engine
        monkeypatch.setattr(gpt, "default_layer_spec", lambda *given: spec)
    model_cfg.transformer_layer_spec = partial(layer_spec, settings=settings, documents=True)
    model = built(model_cfg).double().eval()
    tokens = torch.randint(64, (2, N), generator=torch.Generator().manual_seed(3))

    def forward(part: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        found = Documents.of(bounds, part.numel(), part.device)
        positions = found.positions.view(part.shape)
        rotate_by(model, positions)
        out: torch.Tensor = model(part, positions, None, packed_seq_params=packed(found, part.shape[1], None, positions))
        return out

    ATTENDED.clear()
    whole = forward(tokens, [*ROWS[0], *ROWS[1]])
    assert len(ATTENDED) == (2 if by == BY_ENGINE else 0), "another attention attends"
    for row, out, lengths in zip(tokens, whole, ROWS, strict=True):
        for part, of in zip(row.split(lengths), out.split(lengths), strict=True):
            alone = forward(part.unsqueeze(0), [len(part)])[0]
            assert_close(of, alone, "float64")
            if settings is None and by != BY_ENGINE:  # without any documents, as Megatron's own layers compute it
                plain = model(part.unsqueeze(0), torch.arange(len(part)).unsqueeze(0), None)
                assert_close(of, plain[0], "float64")


LAYOUTS = {
    "CP2, recompute": "--context-parallel-size 2 --recompute-granularity selective --recompute-modules core_attn",
    "PP2, recompute": (
        "--pipeline-model-parallel-size 2 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
    "TP2+SP": "--tensor-model-parallel-size 2 --sequence-parallel",
}
"""Two stages compute a layer again after the next micro-batch went in."""


@pytest.mark.slow
def test_losses_equal_those_of_one_process(tmp_path: Path, documents: list[str]) -> None:
    model, saved = MODELS["deepseek"], str(tmp_path / "checkpoint")
    own = [*LIGHTHOUSE, *without(model.words.split(), "--lighthouse-heads-per-selection")]
    run = partial(harness.run, model=without(model.base, "--lighthouse-budget"), data=documents)
    run(tmp_path / "start", *own, "--train-iters", "1", "--save", saved, "--save-interval", "1")
    one = run(tmp_path / "one", *own, "--load", saved, *START)
    for name, layout in LAYOUTS.items():
        assert_same(run(tmp_path / name, *own, "--load", saved, *START, *layout.split(), ranks=2), one)
