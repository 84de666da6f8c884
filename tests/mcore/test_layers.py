"""Models in which some layers hold no attention: which take Lighthouse, are logged, and become dense."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.launch.sizes import sizes
from megatron_lighthouse.mcore.command_line.layers import attention_layers, in_words
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, settings_from
from megatron_lighthouse.mcore.command_line.stage import Schedule
from megatron_lighthouse.mcore.loop import selection_log
from tests.mcore.harness import MODEL
from tests.mcore.test_selection_log import arguments
from tests.mcore.test_spec import SETTINGS, gpt, lighthouse_layers, transformer_config

KINDS = "aalnaaannlaa"
"""A model of 12 layers, 7 of which hold attention: (a)ttention, a (l)inear map in its place, or (n)othing."""
HOLDING = (1, 2, 5, 6, 7, 11, 12)


def described(kinds: str = KINDS) -> str:
    """In the format of the configuration of NVIDIA's Nemotron models."""
    feed_forward = {"no_op": False, "replace_with_linear": False, "ffn_mult": 2.0}
    blocks = [
        {
            "attention": {
                "n_heads_in_group": 2 if kind == "a" else None,
                "no_op": kind == "n",
                "replace_with_linear": kind == "l",
            },
            "ffn": feed_forward,
        }
        for kind in kinds
    ]
    return json.dumps({"block_configs": blocks})


def given(*words: str, **more: Any) -> Namespace:
    described_at = {"heterogeneous_layers_config_path": "model.json", "heterogeneous_layers_config_encoded_json": described()}
    return arguments(*words, **{**described_at, **more})


def test_the_layers_that_hold_attention(tmp_path: Path) -> None:
    assert attention_layers(given()) == HOLDING
    assert attention_layers(arguments()) is None
    assert attention_layers(given(num_experts=4)) is None
    assert attention_layers(given(heterogeneous_layers_config_path=None)) is None
    in_a_file = {"heterogeneous_layers_config_encoded_json": None, "heterogeneous_layers_config_path": str(tmp_path / "m.json")}
    assert attention_layers(given(**in_a_file)) is None  # the job may see it; where not, Megatron says so
    (tmp_path / "m.json").write_text(described())
    assert attention_layers(given(**in_a_file)) == HOLDING
    for wrong in ("{", "[]", "{}", '{"block_configs": [{}]}', '{"block_configs": [{"attention": 3}]}'):
        (tmp_path / "m.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"m.json does not describe layers .*: give JSON with \"block_configs\""):
            attention_layers(given(**in_a_file))


def test_numbers_in_words() -> None:
    assert in_words((5, 6, 7, 11)) == "5 to 7, 11"
    assert in_words(range(3, 11)) == "3 to 10"


def test_first_and_last_are_of_those_with_attention() -> None:
    settings = settings_from(given())
    assert settings.numbers(12) == (5, 6, 7)
    assert settings.lighthouse_layers(12) == 3
    gradual = replace(settings, schedule=Schedule(10, 3))
    for iteration, selecting in ((10, [5, 6, 7]), (11, [6, 7]), (12, [7]), (13, [])):
        assert [n for n in range(1, 13) if not gradual.is_dense(n, 12, iteration)] == selecting


def test_telemetry_and_pictures_are_of_layers_that_select() -> None:
    from megatron_lighthouse.mcore.loop.pretrain import pictures_of

    assert selection_log.watched_layers(given("--lighthouse-dense-first", "1")) == (2, 5, 7)
    assert list(pictures_of(given(lighthouse_selection_map="{layer}.png"))) == [5, 6, 7]
    named = given("--lighthouse-telemetry-layers", "4", "5", "--lighthouse-telemetry-interval", "3")
    (problem,) = selection_log.problems(named, settings_from(named))
    assert "--lighthouse-telemetry-layers 4: the Lighthouse layers are 5 to 7" in problem


def test_nothing_left_to_lighthouse_is_refused(megatron: None, tmp_path: Path) -> None:
    from megatron_lighthouse.mcore.command_line.checks import check_run

    ends = ["--lighthouse-dense-first", "4", "--lighthouse-dense-last", "3", "--attention", "lighthouse"]
    message = "leave none of 7 layers to Lighthouse"
    config = transformer_config(num_layers=12)
    with pytest.raises(ValueError, match=message):
        check_run(Namespace(**{**vars(given()), "seq_length": 98304}), config, settings_from(given(*ends)))
    (tmp_path / "m.json").write_text(described())
    words = [*MODEL, *ends, "--num-layers", "12", "--heterogeneous-layers-config-path", str(tmp_path / "m.json")]
    assert any(message in problem for problem in sizes(check.parse(words)))
    assert not any("leave none" in problem for problem in sizes(check.parse([*words, "--lighthouse-dense-last", "2"])))


def heterogeneous(**changes: Any) -> Any:
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    options = vars(transformer_config(num_layers=12, normalization="RMSNorm", gated_linear_unit=True))
    names = HeterogeneousTransformerConfig.__dataclass_fields__
    chosen = {name: value for name, value in options.items() if name in names and names[name].init}
    chosen |= {"transformer_impl": "local", "heterogeneous_layers_config_encoded_json": described()}
    return HeterogeneousTransformerConfig(**{**chosen, **changes})


def test_the_model_that_is_built(megatron: None) -> None:
    from megatron_lighthouse.mcore.attention.layer_specs import layer_spec

    config = heterogeneous()
    model_cfg = Namespace(transformer=config, restore_modelopt_state=False)
    model = gpt(layer_spec(model_cfg, settings=SETTINGS), config)
    assert lighthouse_layers(model) == [2, 5, 6, 7]


def test_a_block_that_does_not_say_is_refused(megatron: None) -> None:
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec

    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    config = heterogeneous()
    block = get_gpt_heterogeneous_layer_spec(config)
    with pytest.raises(ValueError, match=r"5 of 12 layers of the block spec hold no core attention.*attention_layers="):
        with_lighthouse(block, SETTINGS)
    says: LighthouseSettings = replace(SETTINGS, attention_layers=attention_layers(config))
    assert lighthouse_layers(gpt(with_lighthouse(block, says), config)) == [2, 5, 6, 7]


def test_a_description_that_megatron_would_ignore_is_refused(megatron: None) -> None:
    from megatron_lighthouse.mcore.command_line.run_options import check_run_options
    from tests.mcore.test_checks import plain_run

    alone = plain_run(heterogeneous_layers_config_encoded_json=described(), heterogeneous_layers_config_path=None)
    with pytest.raises(ValueError, match=r"alone is not heeded by Megatron.* give --heterogeneous-layers-config-path FILE"):
        check_run_options(alone)
