"""Layer specs: which layers take Lighthouse, what they wrap, and that a layer computes what the mathematics says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.scorers.norm import Norm
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from tests.tolerances import assert_close

SETTINGS = LighthouseSettings(LighthouseConfig(budget=8, tile_budget=4), dense_first=1, dense_last=2, rope="mean")
N = 256

pytestmark = pytest.mark.usefixtures("megatron")


def transformer_config(**changes: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    options: dict[str, Any] = {
        **{"num_layers": 6, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8},
        **{"attention_dropout": 0.0, "hidden_dropout": 0.0, "use_cpu_initialization": True, "add_bias_linear": False},
        **{"attention_softmax_in_fp32": True, "bias_dropout_fusion": False, "masked_softmax_fusion": False},
    }
    return TransformerConfig(**{**options, **changes})


def gpt(spec: Any, config: Any) -> Any:
    from megatron.core.models.gpt import GPTModel

    return GPTModel(config, spec, vocab_size=64, max_sequence_length=N, position_embedding_type="rope")


def local_spec(**kind: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(**kind)


def lighthouse_layers(model: Any) -> list[int]:
    from megatron_lighthouse.mcore.attention.core_attention import VariantMixin

    cores = {layer.layer_number: getattr(layer.self_attention, "core_attention", None) for layer in model.decoder.layers}
    return [number for number, core in cores.items() if isinstance(core, VariantMixin)]


def core_attention(settings: LighthouseSettings = SETTINGS, **changes: Any) -> Any:
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    model = gpt(with_lighthouse(local_spec(), settings), transformer_config(**changes))
    return model.decoder.layers[1].self_attention.core_attention


def fused_qkv(batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value as Megatron's layers give them: the value a strided slice."""
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(N, batch, 4, 8, generator=generator).to(dtype)
    key, value = torch.randn(N, batch, 2, 16, generator=generator).to(dtype).split(8, dim=-1)
    assert not value.is_contiguous()
    return [x.detach().requires_grad_() for x in (query, key, value)]


def test_first_and_last_layers_stay_dense() -> None:
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    spec = local_spec()
    model = gpt(with_lighthouse(spec, SETTINGS), transformer_config())
    assert lighthouse_layers(model) == [2, 3, 4]
    assert lighthouse_layers(gpt(spec, transformer_config())) == [], "the spec that was given has changed"


def test_layers_of_a_block_with_experts() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    config = transformer_config(num_moe_experts=2, moe_layer_freq=[0, 1] * 3, moe_ffn_hidden_size=32, moe_router_topk=2)
    spec = with_lighthouse(get_gpt_decoder_block_spec(config, use_transformer_engine=False), SETTINGS)
    model = gpt(with_lighthouse(spec, SETTINGS), config)
    assert lighthouse_layers(model) == [2, 3, 4]
    assert [hasattr(layer.mlp, "experts") for layer in model.decoder.layers] == [False, True] * 3


def test_state_is_that_of_the_dense_model() -> None:
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    dense = gpt(local_spec(), transformer_config()).state_dict()
    assert gpt(with_lighthouse(local_spec(), SETTINGS), transformer_config()).state_dict().keys() == dense.keys()


def test_a_spec_without_core_attention_is_refused() -> None:
    from megatron.core.transformer import ModuleSpec

    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    with pytest.raises(ValueError, match="found no core attention in the layer spec of Identity"):
        with_lighthouse(ModuleSpec(module=torch.nn.Identity), SETTINGS)


def test_a_pipeline_stage_without_attention_is_accepted() -> None:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    assert with_lighthouse(TransformerBlockSubmodules(layer_specs=[]), SETTINGS).layer_specs == []


def test_a_layer_checks_the_model_it_is_built_for() -> None:
    with pytest.raises(ValueError, match=r"--attention-dropout 0.1 .* use --attention-dropout 0"):
        core_attention(attention_dropout=0.1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_computes_lighthouse_attention(batch: int) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    layer = core_attention()
    inputs, same = fused_qkv(batch, torch.float32), fused_qkv(batch, torch.float32)
    out = layer(*inputs, None, attn_mask_type=AttnMaskType.causal)
    expected = lighthouse_attention(*same, SETTINGS.config).flatten(2)
    assert_close(out, expected, "float32")
    for tensor in (out, expected):
        tensor.square().sum().backward()
    for found, wanted in zip(inputs, same, strict=True):
        assert_close(found.grad, wanted.grad, "float32")


@pytest.mark.parametrize("scorer", ["norm", "mass"])
def test_a_layer_takes_the_models_scale(scorer: str) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    settings = replace(SETTINGS, config=SETTINGS.config.replace(scorer=scorer))
    layer, inputs = core_attention(settings, softmax_scale=0.9), fused_qkv(1, torch.float32)
    out = layer(*inputs, None, attn_mask_type=AttnMaskType.causal)
    assert_close(out, lighthouse_attention(*inputs, settings.config, softmax_scale=0.9).flatten(2), "float32")
    assert not torch.allclose(out, lighthouse_attention(*inputs, settings.config).flatten(2), atol=1e-3)


def test_scores_have_the_models_scale_where_the_spec_s_attention_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformer Engine's does: it has got the scale itself. muP's, by the width of heads."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lighthouse.lighthouse.variant import Lighthouse

    settings = replace(SETTINGS, config=SETTINGS.config.replace(scorer="mass"))
    monkeypatch.setattr(Lighthouse, "base_attends", lambda *_: True)
    layer, inputs = core_attention(settings, use_mup=True, mup_base_hidden_size=32), fused_qkv(1, torch.float32)
    assert layer.place.base_attends
    assert layer.place.scale == layer.softmax_scale == 1 / 8
    rows: list[Tensor] = []
    forward = DotProductAttention.forward
    monkeypatch.setattr(
        DotProductAttention, "forward", lambda self, q, *given, **named: rows.append(q) or forward(self, q, *given, **named)
    )
    out = layer(*inputs, None, attn_mask_type=AttnMaskType.causal)
    assert len(rows) == 1
    assert_close(out, lighthouse_attention(*inputs, settings.config, softmax_scale=1 / 8).flatten(2), "float32")


def test_the_attention_of_evaluations_takes_the_models_scale() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lighthouse.mcore.attention.fused import FusedAttention

    inputs, scale = fused_qkv(1, torch.float32), {"softmax_scale": 0.9}
    given: dict[str, Any] = {"config": transformer_config(**scale), "layer_number": 1, "attention_type": "self", **scale}
    fused, megatrons = (kind(**given, attn_mask_type=AttnMaskType.causal) for kind in (FusedAttention, DotProductAttention))
    assert_close(fused(*inputs, None), megatrons(*inputs, None, attn_mask_type=AttnMaskType.causal), "float32")


def test_attention_over_shards_takes_the_models_scale_and_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done with them tests/context_parallel says, on several ranks."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lighthouse.mcore.attention import over_shards as module

    seen: list[Any] = []
    monkeypatch.setattr(module, "sharded_attention", lambda *given, **_: seen.extend(given) or (lambda q, k, v, _: q))
    monkeypatch.setattr(module.Exchange, "over", lambda group: SimpleNamespace(size=2))
    how: dict[str, Any] = {"softmax_scale": 0.9, "cp_comm_type": "all_gather"}
    layer = module.ContextParallelAttention(transformer_config(), 1, AttnMaskType.causal, "self", **how)
    layer(*fused_qkv(1, torch.float32), None)
    assert seen[4:6] == ["all_gather", 0.9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    layer = core_attention(**{kind: True, "params_dtype": dtype})
    query, key, value = fused_qkv(2, dtype)
    out = layer(query, key, value, None, attn_mask_type=AttnMaskType.causal)
    assert out.dtype == dtype
    wide = lighthouse_attention(query.double(), key.double(), value.double(), SETTINGS.config).flatten(2)
    assert_close(out, wide, {"bf16": "bfloat16", "fp16": "float16"}[kind])


def test_calls_that_are_refused() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    layer = core_attention()
    query, key, value = fused_qkv(1, torch.float32)
    causal: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal}
    alone, ranks = layer.place, SimpleNamespace(size=2)
    layer.place = replace(alone, exchange=ranks)
    with pytest.raises(
        ValueError, match=r"cuts packed rows .* use python -m megatron_lighthouse.pretrain_gpt, or --context-parallel-size 1"
    ):
        layer(query, key, value, None, **causal, packed_seq_params=object())
    layer.place = alone
    with pytest.raises(ValueError, match=r"attention_bias .* use --attention dense"):
        layer(query, key, value, None, **causal, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match=r"1 queries and 256 keys: run inference with --attention dense"):
        layer(query[:1], key, value, None, **causal)
    for mask_type in (AttnMaskType.padding, AttnMaskType.no_mask, AttnMaskType.padding_causal):
        with pytest.raises(ValueError, match="causal self-attention"):
            layer(query, key, value, None, attn_mask_type=mask_type)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        pytest.param({"inner": "cudnn"}, "--lighthouse-inner cudnn cannot run", id="inner"),
        pytest.param({"inner": "te"}, "use it with --transformer-impl transformer_engine", id="te"),
        pytest.param({"steps": "kernels"}, "--lighthouse-steps kernels cannot run", id="steps"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has what these name")
def test_what_is_forced_and_not_there_is_named_when_the_model_is_built(
    options: dict[str, str], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    monkeypatch.delenv("TRITON_INTERPRET")
    settings = LighthouseSettings(SETTINGS.config.replace(**options), dense_first=1, dense_last=2, rope="mean")
    with pytest.raises(ValueError, match=rule):
        gpt(with_lighthouse(local_spec(), settings), transformer_config())


def test_a_scorer_whose_package_is_missing_is_refused_when_a_layer_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_installed(self: Norm, steps: Any, device: torch.device) -> None:
        assert steps is reference  # those that run here, not what the config says
        raise ValueError(f"{self.name} needs a package")

    monkeypatch.setattr(Norm, "check_installed", check_installed)
    with pytest.raises(ValueError, match="norm needs a package"):
        core_attention()


def test_the_submodules_of_a_wrapped_spec_are_passed_on() -> None:
    from megatron.core.transformer import ModuleSpec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    class WithParts(DotProductAttention):
        def __init__(self, *args: Any, submodules: str, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.parts = submodules

    spec = local_spec()
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=WithParts, submodules="parts")
    layers = gpt(with_lighthouse(spec, SETTINGS), transformer_config()).decoder.layers
    assert [layer.self_attention.core_attention.parts for layer in layers] == ["parts"] * 6
