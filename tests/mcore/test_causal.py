"""`--lighthouse-causal-selection`: carried by checkpoints, refused where it is not done, and causal in a whole model."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lighthouse import LighthouseConfig, notice
from megatron_lighthouse.lighthouse.variant import LIGHTHOUSE
from megatron_lighthouse.mcore.command_line import causal, pyramid
from megatron_lighthouse.mcore.command_line.settings import settings_from
from megatron_lighthouse.mcore.command_line.stage import Schedule
from megatron_lighthouse.parallax.config import ParallaxConfig
from tests.mcore.test_pyramid import arguments
from tests.mcore.test_rotary import SETTINGS, N, built, checkpoint, config_of

GIVEN, NOT = causal.FLAG, causal.FLAG.replace("--", "--no-", 1)


@pytest.mark.parametrize(
    ("saved", "words", "taken"),
    [
        (None, "", False),
        (None, GIVEN, True),
        ({}, "", False),  # older than the argument
        ({"lighthouse_causal_selection": False}, "", False),
        ({"lighthouse_causal_selection": True}, "", True),
        ({"lighthouse_causal_selection": True, "attention": "dense"}, "", True),  # of a second stage
        ({"lighthouse_causal_selection": True}, NOT, False),
        ({"lighthouse_causal_selection": False}, GIVEN, True),
        ({"lighthouse_causal_selection": True}, "--finetune", False),
    ],
)
def test_a_checkpoint_goes_on_with_its_own(
    saved: dict[str, Any] | None, words: str, taken: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(words)
    args.load = None if saved is None else checkpoint(tmp_path, **{"attention": "lighthouse", **saved})
    assert settings_from(args).config.causal_selection == (words == GIVEN)  # also where nothing was settled
    notice._say.cache_clear()
    with caplog.at_level(logging.WARNING, "megatron_lighthouse"):
        pyramid.settle(args)
        pyramid.settle(args)
    assert args.lighthouse_causal_selection is taken  # which the next checkpoint holds
    assert settings_from(args).config.causal_selection is taken
    assert "\n".join(caplog.messages).count(f"{GIVEN} taken as the checkpoint in") == (taken and not words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lighthouse-scorer mass", f"{GIVEN} .* use --lighthouse-scorer dilated or .* norm or summary, or {NOT}"),
        ("--no-lighthouse-pin-first", f"{GIVEN} .* --no-lighthouse-pin-first .*: use --lighthouse-pin-first, or {NOT}"),
    ],
)
def test_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_from(arguments(f"{GIVEN} {words}"))


def test_documents_are_refused() -> None:
    assert [*LIGHTHOUSE.document_problems(LighthouseConfig(causal_selection=True), 1)] == [
        f"{GIVEN} is not done for packed documents: use {NOT}."
    ]


@pytest.mark.parametrize("is_causal", [True, False])
def test_no_logit_rests_on_a_later_token(is_causal: bool, megatron: None) -> None:
    """Of two layers, each of which selects by what the layer before made of the tokens."""
    from megatron_lighthouse.mcore.attention.layer_specs import layer_spec

    torch.manual_seed(5)
    model_cfg = config_of({}, {})
    settings = replace(SETTINGS, config=SETTINGS.config.replace(causal_selection=is_causal))
    model_cfg.transformer_layer_spec = partial(layer_spec, settings=settings)
    assert (changed_before_others(built(model_cfg)) == 0) == is_causal


STAGE2 = Schedule(stage2_at=3)


@pytest.mark.parametrize(("schedule", "changes"), [(None, False), (STAGE2, False), (STAGE2, True)])
def test_around_parallax_layers_that_do_not_select_round_by_no_later_token(
    schedule: Schedule | None, changes: bool, megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their keys share a mean, which they would be less of; in stage 2 they are plain Parallax, and are."""
    from megatron_lighthouse.mcore.attention.layer_specs import layer_spec
    from megatron_lighthouse.mcore.loop import switch

    monkeypatch.setattr(switch, "iteration", lambda: 4 if changes else 3)
    torch.manual_seed(5)
    model_cfg = config_of({"position_embedding_type": "none"}, {"add_qkv_bias": True})
    own = SETTINGS.config.replace(causal_selection=True, around="parallax")
    settings = replace(SETTINGS, config=own, around=ParallaxConfig(), dense_first=1, schedule=schedule)
    model_cfg.transformer_layer_spec = partial(layer_spec, settings=settings)
    model = built(model_cfg)
    for layer in model.decoder.layers:
        torch.nn.init.constant_(layer.self_attention.linear_qkv.bias, 9)
        torch.nn.init.normal_(layer.self_attention.linear_r.weight, std=0.1)
    assert (changed_before_others(model) > 0) == changes


def changed_before_others(model: Any) -> int:
    """How often, of five, other tokens changed logits before them."""
    model, changed = model.eval(), 0
    tokens, positions = torch.randint(64, (2, N)), torch.arange(N).expand(2, N)
    with torch.no_grad():
        before = model(tokens, positions, None)
        for start in (9, 22, 35, 48, 61):
            others = torch.cat([tokens[:, :start], (tokens[:, start:] + 1) % 64], 1)
            after = model(others, positions, None)
            changed += not torch.equal(before[:, :start], after[:, :start])
            assert not torch.equal(before[:, start:], after[:, start:])
    return changed
