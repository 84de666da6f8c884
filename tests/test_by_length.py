"""What a sequence length asks for where nobody says: accepted for every usual length, on any ranks, and near the table."""

from __future__ import annotations

import argparse

import pytest

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.launch import check
from megatron_lighthouse.mcore.command_line.settings import add_arguments, settings_from
from tests.launch.scripts import TOKENIZER

POWERS = [2**n for n in range(12, 21)]


def given(seq_length: int, words: str = "") -> LighthouseConfig:
    """What the command line makes of a length."""
    args = add_arguments(argparse.ArgumentParser()).parse_args(words.split())
    args.seq_length = seq_length
    return settings_from(args).config


@pytest.mark.parametrize("seq_length", POWERS)
def test_powers_of_two_need_nothing_else(seq_length: int, capsys: pytest.CaptureFixture[str]) -> None:
    for ranks in (1, 2, 4, 8):
        words = f"--num-layers 30 --num-attention-heads 8 --seq-length {seq_length} --context-parallel-size {ranks} --mock-data"
        words += f" --hidden-size 1024 --max-position-embeddings {seq_length} --micro-batch-size 1 --lr 1e-3 --train-iters 4"
        words += " --eval-interval 1000 --attention lighthouse --attention-dropout 0 --transformer-impl local"
        assert check.main(["--nodes", "1", "--gpus-per-node", "8", "--", *words.split(), *TOKENIZER]) == 0
    share = 64 if seq_length <= 2**17 else 128 if seq_length <= 2**19 else 256
    config = given(seq_length)
    assert (config.levels, config.budget) == (4 if share == 256 else 3, seq_length // share)
    assert f"(L {config.levels}, k {config.budget})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seq_length", "words", "levels", "budget", "tile_budget"),
    [
        (98304, "", 3, 1536, 128),  # the paper's
        (256, "", 3, 4, 4),
        (12288, "", 3, 192, 64),  # the share itself, in the largest tiles that it divides into
        (100000, "", 3, 1280, 128),  # 6,250 windows: in ten tiles, and not in twelve
        (32768, "--lighthouse-budget 1024", 3, 1024, 128),
        (2**20, "--lighthouse-levels 3", 3, 4096, 128),
        (2**20, "--lighthouse-pooling 8 --lighthouse-tile-budget 64", 4, 2048, 64),  # as many windows as there are
        (2**31, "", 4, 2**23, 128),
    ],
)
def test_sizes(seq_length: int, words: str, levels: int, budget: int, tile_budget: int) -> None:
    config = given(seq_length, words)
    assert (config.levels, config.budget, config.tile_budget) == (levels, budget, tile_budget)
    config.geometry(seq_length)


def test_an_odd_length_is_told_a_budget_that_fits() -> None:
    """2,062 windows are 2 x 1,031: no budget near the share has so many tiles."""
    with pytest.raises(ValueError, match=r"query's N 32992 .* use config.budget 128 or 256, or query's N 32960"):
        given(32992).geometry(32992)
    given(32992, "--lighthouse-budget 256").geometry(32992)


def test_budgets_are_offered_before_lengths() -> None:
    with pytest.raises(ValueError, match=r"use config.budget 1024 or 2048, or query's N 32640 or 32832\.$"):
        LighthouseConfig().geometry(32768)
    with pytest.raises(ValueError, match=r"use config.budget 16 config.tile_budget 16, or query's N \d+"):
        LighthouseConfig().geometry(1024)
    with pytest.raises(ValueError, match=r"query's N 98305 .* use query's N 98304 or 98560\.$"):  # no budget fits
        given(98305).geometry(98305)


@pytest.mark.parametrize("power", [2**16, 2**17, 2**18, 2**20])
@pytest.mark.parametrize("typed", [-72, -1, 1, 72])
def test_a_length_beside_a_power_of_two_is_offered_that(power: int, typed: int) -> None:
    """As 131,000 for 131,072, whatever budget the odd length would have come nearest to."""
    with pytest.raises(ValueError, match=rf"query's N {power + typed} must be .*: use query's N (\d+ or )?{power}\b"):
        given(power + typed).geometry(power + typed)


def test_the_library_takes_a_length_too() -> None:
    assert LighthouseConfig.for_length(2**20, scorer="dilated") == LighthouseConfig(4, 4, 4096, scorer="dilated")
    assert LighthouseConfig.for_length(2**18, budget=1024).budget == 1024
