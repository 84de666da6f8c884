"""Fields of a config.json's positions and layers that Megatron's command line cannot say: refused, never left out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_lighthouse.convert import rope
from megatron_lighthouse.convert.families import gpt_oss


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"attention_factor": 2.0}, "YaRN's attention_factor 2.0 cannot be carried over: Megatron takes 1.368"),
        ({"truncate": False}, "RoPE's truncate False cannot be carried over"),
        ({"beta_fast": 16}, "RoPE's beta_fast 16 cannot be carried over"),
        ({"original_max_position_embeddings": None}, "RoPE's original_max_position_embeddings 163840 cannot be carried over"),
        ({"factor": None}, "RoPE of type yarn has no factor"),
    ],
)
def test_yarn_of_latents_that_megatron_does_not_turn_by(said: dict[str, Any], named: str) -> None:
    """Of multi-latent attention, whose angles it takes from fewer options."""
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    config = {"max_position_embeddings": 163840, "rope_theta": 10000}
    assert "--rotary-scaling-factor" in rope.arguments({**config, "rope_scaling": yarn}, latent=True)
    with pytest.raises(ValueError, match=re.escape(named)):
        rope.arguments({**config, "rope_scaling": {**yarn, **said}}, latent=True)


def test_kinds_of_layers_that_gpt_oss_has_not() -> None:
    config = {"num_hidden_layers": 2, "sliding_window": 128, "layer_types": ["full_attention", "chunked_attention"]}
    with pytest.raises(ValueError, match="layer_types chunked_attention cannot be carried over: full_attention and"):
        gpt_oss.arguments(config)
