"""MLA, and layers that see a window: what is built, how rows are turned, which heads share a selection, what is refused."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.reference import pool
from megatron_lighthouse.mcore.command_line import before
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments
from megatron_lighthouse.mcore.command_line.flags import parse
from megatron_lighthouse.mcore.command_line.latent import problems
from megatron_lighthouse.mcore.command_line.layers import attention_layers
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, heads_per_selection, settings_from
from megatron_lighthouse.mcore.command_line.stage import Schedule
from megatron_lighthouse.mcore.loop import selection_log
from tests.mcore.test_selection_log import arguments
from tests.mcore.test_spec import SETTINGS, gpt, lighthouse_layers, local_spec, transformer_config
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("megatron")

N = 64
LATENT = LighthouseSettings(LighthouseConfig(budget=2, tile_budget=2), dense_first=1, dense_last=0)


def latent(**changes: Any) -> Any:
    """A GPTModelConfig of two layers, keys of 6 + 4 channels and values of 12."""
    from megatron.core.transformer import MLATransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_lighthouse.mcore.attention.layer_specs import layer_spec

    plain = vars(transformer_config(num_layers=2, num_query_groups=4, transformer_impl="local"))
    names = MLATransformerConfig.__dataclass_fields__
    options = {name: value for name, value in plain.items() if name in names and names[name].init}
    options |= {"multi_latent_attention": True, "q_lora_rank": 8, "kv_lora_rank": 8}
    options |= {"qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 12, "rotary_scaling_factor": 4.0, **changes}
    config = MLATransformerConfig(**options)
    spec = partial(layer_spec, settings=LATENT)
    given = {"position_embedding_type": "rope", "vocab_size": 64, "seq_length": N}
    return GPTModelConfig(transformer=config, transformer_layer_spec=spec, **given)


def built(model_cfg: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder

    groups = ProcessGroupCollection.use_mpu_process_groups()
    return GPTModelBuilder(model_cfg).build_model(groups, pre_process=True, post_process=True)


@pytest.mark.parametrize("options", [{"rope_type": "rope"}, {"rope_type": "yarn"}, {"no_rope_freq": [0, 1]}], ids=str)
def test_rows_of_a_latent_layer_stand_at_their_last_token(options: dict[str, Any]) -> None:
    """The rotated channels come last; what is before them is not turned. No layer is left out, whatever is asked for."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    first, second = (layer.self_attention for layer in built(latent(**options)).decoder.layers)
    core, rotary = second.core_attention, second.core_attention.place.rotary
    assert lighthouse_numbers(first, second) == [2]
    assert (first.core_attention.hidden_size_per_partition, core.hidden_size_per_partition) == (48, 48)
    assert core.place.scale == second.softmax_scale == first.core_attention.softmax_scale
    embedding = second.rotary_pos_emb
    for name in ("inv_freq", "inv_freq_extra", "inv_freq_inter"):
        if hasattr(embedding, name):
            setattr(embedding, name, getattr(embedding, name).double())
    angles = embedding(N)
    angles, mscale = angles if isinstance(angles, tuple) else (angles, 1.0)
    raw = torch.randn(N, 1, 2, 10, dtype=torch.float64)

    def rotated(x: Any) -> Any:
        turned = apply_rotary_pos_emb(x[..., 6:], angles, second.config, mscale=mscale, mla_rotary_interleaved=True)
        return torch.cat([x[..., :6], turned], -1)

    for level, rows in enumerate(pool(rotated(raw), Pyramid(N, 3, 4), rotary)):
        width = 4**level
        at_ends = torch.zeros_like(raw)
        at_ends[width - 1 :: width] = raw.unflatten(0, (-1, width)).mean(1)
        assert_close(rows, rotated(at_ends)[width - 1 :: width], "turned rows")


def lighthouse_numbers(*attentions: Any) -> list[int]:
    from megatron_lighthouse.mcore.attention.core_attention import VariantMixin

    return [x.layer_number for x in attentions if isinstance(x.core_attention, VariantMixin)]


def test_selections_of_as_many_heads_as_sixteen() -> None:
    def of(heads: int, **more: Any) -> int:
        return heads_per_selection(Namespace(**{"num_attention_heads": heads, "multi_latent_attention": True, **more}))

    assert [of(heads) for heads in (1, 8, 16, 24, 32, 40, 64, 100, 128)] == [1, 1, 1, 1, 2, 2, 4, 5, 8]
    assert of(128, multi_latent_attention=False) == 1
    model = latent(num_attention_heads=32, num_query_groups=32).transformer
    assert LATENT.in_model(model).config.heads_per_selection == 2
    asked = replace(LATENT, config=LATENT.config.replace(heads_per_selection=4))
    assert asked.in_model(model).config.heads_per_selection == 4


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        (
            {"scorer": "dilated"},
            {},
            r"--lighthouse-scorer dilated reads values .* have 12 and 10: use --lighthouse-scorer norm",
        ),
        ({"heads_per_selection": 3}, {}, r"--lighthouse-heads-per-selection 3 must divide the 4 .*: use 2 or 4"),
        ({"heads_per_selection": 4}, {"tensor_model_parallel_size": 2}, r"must divide the 2 .*: use 2"),
    ],
)
def test_latent_layers_that_are_refused(config: dict[str, Any], model: dict[str, Any], message: str) -> None:
    from megatron_lighthouse.mcore.command_line.checks import check

    settings = replace(LATENT, config=LATENT.config.replace(**config))
    with pytest.raises(ValueError, match=message):
        check(latent(**model).transformer, settings, N)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--no-rope-freq 2", "--no-rope-freq 2 is not read with multi-latent attention"),
        ("--qk-l2-norm", "use --qk-layernorm"),
        ("--attention-output-gate", "--attention-output-gate does not go with"),
        ("--qk-layernorm", "with --q-lora-rank alone: give that, leave it out, or use --transformer-impl transformer_engine"),
        ("--cache-mla-latents", "is of inference"),
        ("--position-embedding-type yarn", "use --position-embedding-type rope, and --rope-type yarn"),
        ("--rope-type rope", "add --no-rope-fusion"),
        ("--mla-down-proj-fusion --q-lora-rank 8", "leave it out, or use --transformer-impl transformer_engine"),
        ("--mla-down-proj-fusion --transformer-impl transformer_engine", "fuses what --q-lora-rank makes"),
    ],
)
@pytest.mark.parametrize("of", ["--multi-latent-attention", "--hybrid-layer-pattern +-"])
def test_words_that_latent_attention_does_not_take(of: str, words: str, says: str) -> None:
    """Of which Megatron says nothing, or fails once layers are built or called."""

    def said(*more: str) -> list[str]:
        given = [*of.split(), "--transformer-impl", "local", "--position-embedding-type", "rope", *more]
        return [*problems(parse(given, with_all_arguments)[0])]

    assert said() == said("--mla-down-proj-fusion", "--q-lora-rank", "8", "--transformer-impl", "transformer_engine") == []
    (problem,) = said(*words.split())
    assert says in problem
    assert said("--qk-layernorm", "--q-lora-rank", "8") == []
    assert said("--rope-type", "rope", "--position-embedding-type", "none") == []  # with which Megatron fuses nothing


def test_layers_without_rotation_are_not_counted_where_none_is_read() -> None:
    words = ["--no-rope-freq", "2"]
    assert [*before._unrotated(parse(words, with_all_arguments)[0], 3)]
    assert not [*before._unrotated(parse([*words, "--multi-latent-attention"], with_all_arguments)[0], 3)]


def test_a_fused_projection_of_latents_needs_them() -> None:
    (problem,) = problems(parse(["--mla-down-proj-fusion"], with_all_arguments)[0])
    assert "leave it out, or add that" in problem


def test_norms_of_latents_leave_heads_of_unlike_lengths() -> None:
    from megatron_lighthouse.mcore.command_line.checks import check

    check(latent(qk_layernorm=True).transformer, LATENT, N)


def test_latent_layers_of_another_attention_are_refused() -> None:
    from megatron_lighthouse.mcore.command_line.checks import check
    from megatron_lighthouse.parallax.config import ParallaxConfig

    parallax = LighthouseSettings(ParallaxConfig(), 0, 0, False, variant="parallax")
    with pytest.raises(ValueError, match="--multi-latent-attention is not done by --attention parallax: leave it out"):
        check(latent().transformer, parallax, N)


def test_a_hybrid_model_whose_attention_is_windowed_throughout_is_refused() -> None:
    """Its layers are numbered by symbols: those of `*-*-*-` are odd, and each second layer is even."""
    from megatron_lighthouse.mcore.command_line.checks import check

    every_second = {"window_size": (7, 0), "window_attn_skip_freq": 2}
    layers = attention_layers(Namespace(hybrid_layer_pattern="*-*-*-", num_layers=6, **every_second))
    assert layers == ()
    with pytest.raises(ValueError, match=r"--window-size 7,0 with --window-attn-skip-freq 2 makes all layers see"):
        check(transformer_config(**every_second), replace(SETTINGS, attention_layers=layers), N)


def test_windowed_layers_stay_and_the_others_are_counted() -> None:
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    every_second = {"window_size": (7, 0), "window_attn_skip_freq": 2}
    assert attention_layers(transformer_config(**every_second)) == (2, 4, 6)
    args = arguments(**every_second)
    assert settings_from(args).numbers(12) == selection_log.watched_layers(args) == (6, 8)
    gradual = replace(settings_from(args), schedule=Schedule(10, 2))
    assert [n for n in range(1, 13) if not gradual.is_dense(n, 12, 11)] == [8]
    listed = {"window_size": (7, 0), "window_attn_skip_freq": [0, 1, 1, 0, 0, 0]}
    config = transformer_config(**listed, softmax_type="learnable")
    assert attention_layers(config) == (1, 4, 5, 6)
    for settings in (SETTINGS, replace(SETTINGS, attention_layers=(1, 2, 4, 5, 6))):  # by the model, whatever they say
        model = gpt(with_lighthouse(local_spec(), settings), config)
        assert lighthouse_layers(model) == [4]
    windows = [layer.self_attention.core_attention.scale_mask_softmax.window_size for layer in model.decoder.layers]
    assert windows == [None, (7, 0), (7, 0), None, None, None]
    sinks = {name: x for name, x in model.named_parameters() if name.endswith("softmax_offset")}
    assert len(sinks) == 6
    assert all(x.tensor_model_parallel for x in sinks.values())
