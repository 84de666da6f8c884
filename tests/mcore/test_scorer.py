"""`--lighthouse-scorer auto`: by the model, or as the checkpoint has it."""

from __future__ import annotations

import argparse
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse import notice
from megatron_lighthouse.mcore.command_line import pyramid
from megatron_lighthouse.mcore.command_line.settings import ENVIRONMENT, settings_from
from tests.mcore.test_pyramid import arguments
from tests.mcore.test_rotary import checkpoint

BY_MODEL = [
    ({}, "norm"),
    ({"qk_layernorm": True}, "mass"),
    ({"qk_l2_norm": True}, "mass"),
    ({"qk_layernorm": True, "multi_latent_attention": True}, "norm"),
]


def settled(caplog: pytest.LogCaptureFixture, args: Namespace) -> tuple[str, str]:
    """The scorer that a run takes, and all that it says."""
    notice._say.cache_clear()
    with caplog.at_level(logging.WARNING, "megatron_lighthouse"):
        pyramid.settle(args)
        pyramid.settle(args)
    assert settings_from(args).config.scorer == args.lighthouse_scorer
    return args.lighthouse_scorer, "\n".join(caplog.messages)


def of(words: str = "", **model: Any) -> Namespace:
    args = arguments(words)
    vars(args).update({"qk_layernorm": False, "qk_l2_norm": False, **model})
    return args


@pytest.mark.parametrize(("model", "scorer"), BY_MODEL)
def test_the_model_decides_and_that_is_said_once(model: dict[str, bool], scorer: str, caplog: pytest.LogCaptureFixture) -> None:
    assert settings_from(of(**model)).config.scorer == scorer  # also where nothing was settled
    found, said = settled(caplog, of(**model))
    assert found == scorer
    assert said.count(f"--lighthouse-scorer {scorer} taken") == 1
    assert ("makes queries and keys" in said) == (scorer == "mass")


def test_what_is_given_wins(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    args = of("--lighthouse-scorer dilated", qk_layernorm=True)
    args.load = checkpoint(tmp_path, attention="lighthouse", lighthouse_scorer="gla")
    found, said = settled(caplog, args)
    assert found == "dilated"
    assert "--lighthouse-scorer" not in said


@pytest.mark.parametrize(
    ("saved", "words", "model", "scorer"),
    [
        ({"lighthouse_scorer": "dilated"}, "", {"qk_layernorm": True}, "dilated"),
        ({"lighthouse_scorer": "summary"}, "", {}, "summary"),
        ({"lighthouse_scorer": "norm"}, "", {}, "norm"),
        ({"lighthouse_scorer": "mass"}, "", {}, "mass"),
        ({"lighthouse_scorer": "dilated", "attention": "dense"}, "", {}, "dilated"),  # of a second stage
        ({"lighthouse_scorer": "dilated"}, "--finetune", {"qk_layernorm": True}, "mass"),
        ({"lighthouse_scorer": "norm", "attention": "dense"}, "", {"qk_layernorm": True}, "mass"),  # its release's default
        ({}, "", {"qk_layernorm": True}, "mass"),
        ({}, "", {}, "norm"),
    ],
)
def test_a_checkpoint_goes_on_with_its_own(
    saved: dict[str, Any],
    words: str,
    model: dict[str, bool],
    scorer: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = of(words, **model)
    args.load = checkpoint(tmp_path, **{"attention": "lighthouse", **saved})
    found, said = settled(caplog, args)
    assert found == scorer
    kept = saved.get("lighthouse_scorer") == scorer and scorer != ("mass" if model else "norm")
    assert (f"--lighthouse-scorer {scorer} taken as the checkpoint" in said) == kept


def test_a_dense_run_says_nothing_and_hands_it_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = of()
    args.attention, args.load = "dense", checkpoint(tmp_path, attention="lighthouse", lighthouse_scorer="dilated")
    assert settled(caplog, args) == ("dilated", "")


@pytest.mark.parametrize(("model", "scorer"), BY_MODEL)
def test_a_parser_that_does_not_know_it(model: dict[str, bool], scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of upstream's script, with the arguments in the environment."""
    monkeypatch.setenv(ENVIRONMENT, "--attention lighthouse")
    assert settings_from(argparse.Namespace(**model)).config.scorer == scorer
