"""Levels and budgets that the command line leaves open: the checkpoint's where it goes on, else the length's."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse import notice
from megatron_lighthouse.mcore.command_line import flags, pyramid
from megatron_lighthouse.mcore.command_line.settings import ENVIRONMENT, add_arguments, settings_by_spec, settings_from
from tests.mcore.test_rotary import checkpoint

SAVED = {"seq_length": 98304, "attention": "lighthouse", "lighthouse_pooling": 4, "lighthouse_levels": 3}
SAVED |= {"lighthouse_budget": 3072, "lighthouse_tile_budget": 96}


def arguments(words: str = "", seq_length: int = 98304) -> Namespace:
    args, _ = flags.parse(["--attention", "lighthouse", *words.split()], add_arguments)
    args.seq_length, args.spec, args.pretrained_checkpoint = seq_length, None, None
    return args


@pytest.mark.parametrize(
    ("saved", "words", "seq_length", "sizes", "says"),
    [
        ({}, "", 98304, (3, 3072, 96), "budget 3072 .* as the checkpoint in .* was trained"),
        ({}, "--lighthouse-budget 3072", 98304, (3, 3072, 96), "tile-budget 96 taken as"),
        ({}, "--lighthouse-budget 1536", 98304, (3, 1536, 128), "tile-budget 128 taken for 98304 tokens"),
        ({}, "--finetune", 98304, (3, 1536, 128), "budget 1536 .* for 98304 tokens"),
        ({}, "", 2**20, (4, 4096, 128), "levels 4 .* for 1048576 tokens"),
        (
            {"seq_length": 2**15, "lighthouse_budget": 1536, "lighthouse_tile_budget": 128},
            "",
            2**15,
            (3, 512, 128),
            "for 32768 tokens",
        ),  # as dense runs had
        ({"lighthouse_budget": None}, "", 98304, (3, 1536, 128), "for 98304 tokens"),
    ],
)
def test_a_checkpoint_goes_on_with_its_sizes(
    saved: dict[str, Any],
    words: str,
    seq_length: int,
    sizes: tuple[int, int, int],
    says: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = arguments(words, seq_length)
    args.load = checkpoint(tmp_path, **{**SAVED, **saved})
    notice._say.cache_clear()
    with caplog.at_level(logging.WARNING, "megatron_lighthouse"):
        pyramid.settle(args)
    found = args.lighthouse_levels, args.lighthouse_budget, args.lighthouse_tile_budget
    assert found == sizes
    config = settings_from(args).config
    assert (config.levels, config.budget, config.tile_budget) == found
    (said,) = caplog.messages
    assert re.search(says, said)


def test_a_spec_in_upstreams_script_goes_on_with_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose parser knows none of the options, so that its checkpoints would not hold them."""
    monkeypatch.setenv(ENVIRONMENT, "--lighthouse-dense-first 1")
    args, _ = flags.parse(["--spec", "megatron_lighthouse.mcore.spec", "lighthouse"], lambda parser: parser)
    args.seq_length, args.pretrained_checkpoint = 98304, None
    args.load = checkpoint(tmp_path, **SAVED, lighthouse_rope="mean")
    notice._say.cache_clear()
    with caplog.at_level(logging.WARNING, "megatron_lighthouse"):
        settings = settings_by_spec(args)
    assert (settings.config.budget, settings.config.tile_budget, settings.dense_first, settings.rope) == (3072, 96, 1, "mean")
    assert any(re.search("budget 3072 .* as the checkpoint in .* was trained", said) for said in caplog.messages)
    assert (args.lighthouse_budget, args.lighthouse_rope) == (3072, "mean")  # which the next checkpoint holds
    assert settings_by_spec(args) == settings  # of another stage of the model


def test_what_is_given_is_not_touched(tmp_path: Path) -> None:
    args = arguments("--lighthouse-levels 2 --lighthouse-budget 64 --lighthouse-tile-budget 32")
    args.load = checkpoint(tmp_path, **SAVED)
    assert pyramid.choice(args, tmp_path) == ({}, None)


@pytest.mark.parametrize("flag", ["--lighthouse-budget", "--lighthouse-edge-budget"])
def test_documents_have_no_budget_of_a_sequence(flag: str) -> None:
    args = arguments(f"{flag} 768 --dataloader-inter-document-masking")
    with pytest.raises(ValueError, match=rf"{flag} 768 is of one sequence, .* use --lighthouse-tile-budget"):
        pyramid.settle(args)


def test_a_run_that_selects_nothing_hands_its_budget_on() -> None:
    args = arguments("--lighthouse-budget 768 --dataloader-inter-document-masking")
    args.attention = "dense"
    pyramid.settle(args)
    assert args.lighthouse_budget == 768


@pytest.mark.parametrize("seq_length", [131072, 128000, 4090])
def test_tiles_of_documents_do_not_hang_on_the_row(seq_length: int) -> None:
    args = arguments("--dataloader-inter-document-masking", seq_length)
    pyramid.settle(args)
    assert settings_from(args).config.rule.tile_budget == 128
