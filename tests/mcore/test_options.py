"""The flags of an attention come from its config: their names, defaults, values and help."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import pytest

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line.settings import add_arguments
from megatron_lighthouse.options import add_options, option, read_options

FLAGS = {
    "levels": (None, "5", 5, "Levels of the pyramid (L)"),
    "pooling": (4, "2", 2, "Pooling factor (p)"),
    "budget": (None, "256", 256, "seq/p^(L-1) + (L-1)*p*k. Default: what the sequence length asks for."),
    "tile_budget": (None, "64", 64, "the sequence has budget/tile-budget tiles"),
    "scorer": ("auto", "gla", "gla", "What ranks the entries"),
    "inner": ("auto", "sdpa", "sdpa", "The attention over the gathered rows"),
    "steps": ("auto", "reference", "reference", "'auto' takes the kernels on a GPU. Default: auto."),
    "pin_first": (True, None, False, "Default: on; the authors' code"),
    "causal_selection": (None, None, False, "Default: off; what goes on from a checkpoint takes the checkpoint's."),
}
"""Field -> its default (None: by the length), a word after its flag (None: after --no-…), what that means, and of its help."""


def lighthouse() -> argparse.ArgumentParser:
    return add_arguments(argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=1000)))


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_lighthouse(name: str) -> None:
    default, word, meant, text = FLAGS[name]
    assert getattr(lighthouse().parse_args([]), f"lighthouse_{name}") == default
    assert default is None or name == "scorer" or getattr(LighthouseConfig(), name) == default
    words = [flag(name).replace("--", "--no-", 1)] if word is None else [flag(name), word]
    found = getattr(lighthouse().parse_args(words), f"lighthouse_{name}")
    assert found == meant
    assert type(found) is type(getattr(LighthouseConfig(), name))
    assert text in lighthouse().format_help()


def test_every_field_of_lighthouse_is_a_flag() -> None:
    given = vars(lighthouse().parse_args([]))
    assert all(f"lighthouse_{one.name}" in given for one in fields(LighthouseConfig))


@pytest.mark.parametrize("words", ["--lighthouse-scorer other", "--lighthouse-inner other", "--lighthouse-steps other"])
def test_other_values_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lighthouse().parse_args(words.split())
    assert "invalid choice: 'other'" in capsys.readouterr().err


@dataclass(frozen=True)
class Config:
    factor: float = option(0.5, "A factor.")
    two_words: str = option("a", "A word.", ("a", "b"))


def test_a_config_of_another_attention() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument_group("other"), "other-one", Config)
    args = parser.parse_args(["--other-one-factor", "2", "--other-one-two-words", "b"])
    assert read_options(args, "other-one", Config) == Config(2.0, "b")
    assert "A factor. Default: 0.5." in " ".join(parser.format_help().split())
