"""Windows and sinks over packed documents, as gpt-oss has them, with Megatron's local layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.mcore import harness
from tests.mcore.harness import without
from tests.mcore.test_documents import LIGHTHOUSE, documents
from tests.mcore.test_models import MODELS
from tests.mcore.test_packed import documents_of_rows, each_alone, with_gradients
from tests.mcore.test_parity import START, assert_same
from tests.mcore.test_spec import N, fused_qkv, transformer_config
from tests.tolerances import assert_close

__all__ = ["documents"]
LAYOUTS = {
    "CP2": "--context-parallel-size 2 --cp-comm-type p2p",
    "PP2, two rows at once": "--pipeline-model-parallel-size 2 --micro-batch-size 2",
    "TP2+SP": "--tensor-model-parallel-size 2 --sequence-parallel",
}


@pytest.mark.slow
def test_losses_equal_those_of_one_process(tmp_path: Path, documents: list[str]) -> None:
    model, saved = MODELS["gpt-oss"], str(tmp_path / "checkpoint")
    own = [*LIGHTHOUSE, *model.words.split()]
    run = partial(harness.run, model=without(model.base, "--lighthouse-budget"), data=documents)
    run(tmp_path / "start", *own, "--train-iters", "1", "--save", saved, "--save-interval", "1")
    one = run(tmp_path / "one", *own, "--load", saved, *START)
    for name, layout in LAYOUTS.items():
        assert_same(run(tmp_path / name, *own, "--load", saved, *START, *layout.split(), ranks=2), one)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("window", [None, (9, 0)], ids="window={}".format)
def test_each_document_of_a_local_layer_is_as_if_alone(window: tuple[int, int] | None) -> None:
    """Against Megatron's own layer over each, with sinks that differ by head."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lighthouse.mcore.attention.fused import FusedAttention
    from megatron_lighthouse.mcore.attention.packed import packed

    config = transformer_config(window_size=window, softmax_type="learnable")
    ours, theirs = (kind(config, 1, AttnMaskType.causal, "self").double() for kind in (FusedAttention, DotProductAttention))
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.softmax_offset.copy_(torch.linspace(-1, 2, 4))
    inputs = fused_qkv(2, torch.float64)

    def alone(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        past = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(k))
        return theirs(q, k, v, (past < 0).view(1, 1, *past.shape))

    with pytest.raises(ValueError, match="windows and sinks over packed documents alone: give packed_seq_params"):
        ours(*inputs, None)
    out = ours(*inputs, None, packed_seq_params=packed(documents_of_rows(), N))
    of_sinks = [*inputs, ours.softmax_offset], [*inputs, theirs.softmax_offset]
    both = (out, each_alone(alone, inputs))
    for a, b in zip(*(with_gradients(x, leaves) for x, leaves in zip(both, of_sinks, strict=True)), strict=True):
        assert_close(a, b, "float64")
