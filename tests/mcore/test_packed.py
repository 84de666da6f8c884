"""Core attention and RoPE over packed documents, in one process: every document is as if it were alone."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import lighthouse_attention
from megatron_lighthouse.mcore.command_line.documents import FLAG, document_problems, remark
from megatron_lighthouse.sequence.documents import Documents
from tests.mcore.test_spec import SETTINGS, N, core_attention, fused_qkv, gpt, local_spec, transformer_config
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("megatron")

ROWS = ([100, 1, 30, 125], [7, 249])
"""Lengths of the documents of two rows of N tokens."""


def documents_of_rows() -> Documents:
    from megatron_lighthouse.mcore.data.documents import documents_in

    filled = [[0, *torch.tensor(row).cumsum(0).tolist(), N, N][:6] for row in ROWS]
    found = documents_in(torch.tensor([row + [N] * (6 - len(row)) for row in filled], dtype=torch.int32))
    assert found.lengths == (*ROWS[0], *ROWS[1])
    return found


def each_alone(layer: Any, inputs: list[Tensor]) -> Tensor:
    """[N, b, H * D], of calls with one document each."""
    columns = []
    for column, row in enumerate(ROWS):
        parts = zip(*(x[:, column : column + 1].split(row) for x in inputs), strict=True)
        columns.append(torch.cat([layer(*part, None) for part in parts]))
    return torch.cat(columns, dim=1)


def fused_attention() -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lighthouse.mcore.attention.fused import FusedAttention

    return FusedAttention(transformer_config(), 1, AttnMaskType.causal, "self")


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def test_rows_of_documents_equal_each_document_alone() -> None:
    from megatron_lighthouse.mcore.attention.packed import packed

    inputs, layer = fused_qkv(2, torch.float64), fused_attention()
    out = layer(*inputs, None, packed_seq_params=packed(documents_of_rows(), N))
    expected = each_alone(layer, inputs)
    for a, b in zip(with_gradients(out, inputs), with_gradients(expected, inputs), strict=True):
        assert_close(a, b, "float64")


def thd(documents: Documents) -> Any:
    """What upstream's script gives, of which all rows are one."""
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds, longest = documents.cu_seqlens, documents.longest
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def test_megatrons_own_packed_rows_are_taken() -> None:
    inputs, layer = fused_qkv(2, torch.float64), fused_attention()
    out = layer(*(x.transpose(0, 1).flatten(0, 1) for x in inputs), None, packed_seq_params=thd(documents_of_rows()))
    assert_close(out.unflatten(0, (2, -1)).transpose(0, 1), each_alone(layer, inputs), "float64")


def test_a_core_attention_that_takes_packed_rows_is_given_all_rows_as_one() -> None:
    """Transformer Engine's is not here: what it is given, an attention with its interface reads."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_lighthouse.mcore.attention.packed import class_over_thd, packed

    ours = fused_attention()

    class Engine:
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, packed_seq_params: Any) -> Tensor:
            assert query.shape == (2 * N, 4, 8)
            assert type(packed_seq_params) is PackedSeqParams
            assert (packed_seq_params.qkv_format, packed_seq_params.max_seqlen_q) == ("thd", 249)
            out: Tensor = ours(query, key, value, mask, packed_seq_params=packed_seq_params)
            return out

    inputs = fused_qkv(2, torch.float64)
    out = class_over_thd(Engine)().forward(*inputs, None, packed_seq_params=packed(documents_of_rows(), N))
    assert_close(out, each_alone(ours, inputs), "float64")


@pytest.mark.parametrize("discard", [True, False], ids=["scattered again", "kept"])
def test_lighthouse_is_given_the_documents(discard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lighthouse.mcore.attention.packed import packed

    layer, inputs = core_attention(), fused_qkv(2, torch.float64)
    monkeypatch.setattr(layer, "place", SimpleNamespace(**{**vars(layer.place), "discard_output": discard}))
    out = layer(*inputs, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed(documents_of_rows(), N))
    row = [x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in inputs]
    expected = lighthouse_attention(*row, SETTINGS.config, cu_seqlens=documents_of_rows().cu_seqlens)
    expected = expected.view(2, N, -1).transpose(0, 1)
    for a, b in zip(with_gradients(out, inputs), with_gradients(expected, inputs), strict=True):
        assert_close(a, b, "float64")
    assert hasattr(out, "lighthouse_source") == discard
    if discard:
        assert torch.equal(out.lighthouse_source().flatten(2), out)
    in_one = layer(*(x.squeeze(1) for x in row), None, packed_seq_params=thd(documents_of_rows()))
    assert_close(in_one, expected.transpose(0, 1).flatten(0, 1), "float64")


@pytest.mark.parametrize("kind", ["rope", "yarn"])
def test_each_token_is_rotated_by_its_place_in_its_document(kind: str) -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    from megatron_lighthouse.mcore.attention.document_rotary import rotate_by
    from megatron_lighthouse.mcore.data.documents import tokens_of_rank
    from megatron_lighthouse.sequence.layout import Layout

    documents = documents_of_rows()
    ranks: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    make = RotaryEmbedding if kind == "rope" else YarnRotaryEmbedding
    rotary = make(8, rotary_percent=1.0, use_cpu_initialization=True, cp_group=ranks)
    tokens = tokens_of_rank(documents, 2, Layout(2, 1))
    rotate_by(SimpleNamespace(rotary_pos_emb=rotary), documents.positions[tokens])
    found = rotary(N)
    found = found[0] if isinstance(found, tuple) else found
    angles = rotary.get_emb(N)
    angles = (angles[0] if isinstance(angles, tuple) else angles)[:, 0, 0]
    alone = torch.cat([angles[:length] for length in documents.lengths])
    assert torch.equal(found[:, :, 0], alone[tokens].transpose(0, 1))
    rotate_by(SimpleNamespace(rotary_pos_emb=rotary), documents.positions[tokens].flip(0))
    again = rotary(N)
    assert torch.equal((again[0] if isinstance(again, tuple) else again).flip(1), found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        (
            {"context_parallel_size": 2},
            "--context-parallel-size 2: upstream's pretrain_gpt.py cuts packed rows",
        ),
        ({"pipeline_model_parallel_size": 3, "pipeline_dtype": torch.float32}, "--pipeline-model-parallel-size 3"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1: in upstream's pretrain_gpt.py a document's last token but one"),
    ],
    ids=["one rank", "context parallel", "three stages", "further tokens"],
)
def test_what_upstreams_loop_does_not_do_is_refused_when_the_model_is_built(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By --spec, and in its patched script; RoPE would fail before a layer could say why."""
    from megatron_lighthouse.mcore import arguments
    from megatron_lighthouse.mcore.attention import layer_specs

    given = Namespace(seq_length=N, dataloader_inter_document_masking=True)
    monkeypatch.setattr(layer_specs, "global_args", lambda: given)
    monkeypatch.setattr(layer_specs, "settled", lambda args, config: SETTINGS)
    monkeypatch.setattr(layer_specs, "layer_spec", lambda *args, **kwargs: "built")
    monkeypatch.setattr(arguments.arguments, "use_attention", lambda args, model_cfg: "built")
    config = transformer_config(**changes)
    config.transformer_impl = "local"
    model_cfg = SimpleNamespace(transformer=config)
    for build in (lambda: layer_specs.lighthouse(model_cfg), lambda: arguments.use_attention(given, model_cfg)):
        if message:
            with pytest.raises(ValueError, match=f"{FLAG} with {message}.* use python -m megatron_lighthouse.pretrain_gpt, or"):
                build()
        else:
            assert build() == "built"


def test_rows_that_upstream_cuts_as_one_sequence_are_refused() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lighthouse.mcore.attention.packed import check_call

    with pytest.raises(ValueError, match=r"use python -m megatron_lighthouse.pretrain_gpt, or --context-parallel-size 1"):
        check_call("attention", AttnMaskType.causal, None, thd(documents_of_rows()), 2)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {}, ""),
        ({}, {"context_parallel_size": 2}, ""),
        ({}, {"transformer_impl": "transformer_engine", "attention_dropout": 0.1}, ""),
        ({}, {"transformer_impl": "transformer_engine", "context_parallel_size": 2}, "use --transformer-impl local"),
        ({}, {"transformer_impl": "inference_optimized"}, "use local or transformer_engine"),
        ({"position_embedding_type": "mrope"}, {}, "use rope or yarn"),
        ({}, {"multi_latent_attention": True}, ""),
        ({}, {"multi_latent_attention": True, "apply_rope_fusion": True}, "add --no-rope-fusion"),
        ({}, {"multi_latent_attention": True, "transformer_impl": "transformer_engine"}, ""),
        ({}, {"experimental_attention_variant": "dsa"}, "leave one of them out"),
        ({}, {"cuda_graph_impl": "local"}, "--cuda-graph-impl local"),
        ({}, {"attention_dropout": 0.1}, "use --attention-dropout 0"),
        ({}, {"window_size": (128, 0)}, ""),
        ({}, {"qk_clip": True}, "--qk-clip is not done"),
        ({}, {"softmax_type": "learnable"}, ""),
    ],
    ids=str,
)
def test_what_documents_do_not_go_with(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    config = transformer_config()
    for name, value in {"transformer_impl": "local", **changes}.items():
        setattr(config, name, value)
    args = Namespace(dataloader_inter_document_masking=True, **options)
    found = [*document_problems(args, config)]
    assert len(found) == bool(message)
    if message:
        with pytest.raises(ValueError, match=f"{FLAG}.*{message}"):
            raise ValueError(found[0])
    assert not [*document_problems(Namespace(), config)]


def test_unequal_work_is_said_once_at_the_start() -> None:
    said = remark(Namespace(context_parallel_size=1, data_parallel_size=4))
    assert "The 4 data-parallel ranks have other documents each" in said
    assert "bytes" not in said
    said = remark(Namespace(context_parallel_size=2, data_parallel_size=1))
    assert "data-parallel" not in said
    assert "So do the bytes that context-parallel ranks send." in said


def test_lighthouse_over_ranks_is_let_by_watched_or_not() -> None:
    from megatron_lighthouse.mcore.command_line.checks import check_run

    given = Namespace(seq_length=N, dataloader_inter_document_masking=True, transformer_impl="local")
    config = transformer_config()
    config.transformer_impl = "local"
    for config.context_parallel_size, given.lighthouse_telemetry_interval in ((1, 0), (2, 0), (2, 10)):
        check_run(given, config, SETTINGS)


def test_a_core_attention_is_exchanged_once_and_another_is_refused() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_lighthouse.mcore.attention.fused import of_documents

    once = of_documents(DotProductAttention)
    assert of_documents(once) is once
    with pytest.raises(ValueError, match="takes the core attention of Megatron's own layer specs, not"):
        of_documents(SimpleNamespace)


def test_a_model_given_packed_rows_as_upstream_gives_them_has_the_same_logits() -> None:
    """Whose RoPE for 'thd' begins anew in each document, and whose micro-batch is one row: dense layers and Lighthouse."""
    from megatron_lighthouse.mcore.attention.document_rotary import rotate_by
    from megatron_lighthouse.mcore.attention.layer_specs import _with_documents, with_lighthouse
    from megatron_lighthouse.mcore.attention.packed import packed

    config, documents = transformer_config(), documents_of_rows()
    model = gpt(with_lighthouse(_with_documents(local_spec(), config), SETTINGS), config).cuda().eval()
    tokens = torch.randint(64, (2, N), generator=torch.Generator().manual_seed(3)).cuda()
    upstream = model(tokens.view(1, -1), documents.positions.view(1, -1), None, packed_seq_params=thd(documents))
    rotate_by(model, documents.positions.view(2, N))
    ours = model(tokens, documents.positions.view(2, N), None, packed_seq_params=packed(documents, N))
    assert_close(ours.flatten(0, 1), upstream.flatten(0, 1), "float32")
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5)).to(ours)
    parameters = [*model.parameters()]
    trained, by_upstream = (torch.autograd.grad((out * weights.view(out.shape)).mean(), parameters) for out in (ours, upstream))
    for a, b in zip(trained, by_upstream, strict=True):
        assert_close(a, b, "float32")
    tokens[0, 150:] = 0  # of the last document of the first row
    changed = model(tokens, documents.positions.view(2, N), None, packed_seq_params=packed(documents, N))
    assert torch.equal(changed[0, :131], ours[0, :131])
    assert torch.equal(changed[1], ours[1])
    assert not torch.equal(changed[0, 150:], ours[0, 150:])
