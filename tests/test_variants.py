"""The registry: it alone lists the attentions, and nothing goes by their names."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import megatron_lighthouse
from megatron_lighthouse.lighthouse.around import AROUND
from megatron_lighthouse.mcore.command_line.settings import add_arguments, settings_from
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.run import check_names
from megatron_lighthouse.plan.words import recipe_words, run_of_words
from megatron_lighthouse.variants import VARIANTS, register
from tests.toy_variant.toy import TOY, Toy, ToyConfig

PACKAGE = Path(megatron_lighthouse.__file__).parent
ROOT = PACKAGE.parent
NAMES = "|".join(VARIANTS)
COMPARED = re.compile(rf"""attention\w*["']?\]? *(==|!=|=~|in|not in) *[\[(^]*["']?({NAMES})\b|choices=[\[(]"({NAMES})\"""")


@pytest.fixture
def toy() -> Iterator[None]:
    register(TOY)
    yield
    del VARIANTS[TOY.name]


def parser() -> argparse.ArgumentParser:
    return add_arguments(argparse.ArgumentParser())


def test_the_names_of_today() -> None:
    assert list(VARIANTS) == ["dense", "lighthouse", "parallax", "wall"]


def test_one_line_makes_flags_and_settings(toy: None) -> None:
    given = settings_from(parser().parse_args("--attention toy --toy-warmest 3".split()))
    assert given.config == ToyConfig(warmest=3.0)
    assert (given.attention, given.numbers(4)) == (TOY, (1, 2, 3, 4))
    assert all(hasattr(parser().parse_args([]), f"toy_{one.name}") for one in fields(ToyConfig))
    with pytest.raises(ValueError, match=r"--toy-warmest -1\.0 must be positive"):
        settings_from(parser().parse_args("--attention toy --toy-warmest -1".split()))


def test_what_the_plan_does_not_count_is_refused(toy: None) -> None:
    with pytest.raises(ValueError, match="--attention 'toy' is not known: use dense or lighthouse or parallax or wall"):
        check_names("toy", None, None)


def test_the_scripts_read_the_same_names() -> None:
    script = f"ROOT={ROOT}; source {ROOT}/launch/study.sh; known_attentions"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.split() == list(VARIANTS)


@pytest.mark.parametrize(
    "line", ['if args.attention == "dense":', "[[ $attention =~ ^(dense|lighthouse)$ ]]", 'choices=["dense"']
)
def test_a_comparison_is_recognized(line: str) -> None:
    assert COMPARED.search(line)


def test_lighthouse_names_no_attention_that_it_can_be_around() -> None:
    others = "|".join(variant.name for variant in AROUND.values() if not variant.native)
    text = "".join(file.read_text() for file in (PACKAGE / "lighthouse").rglob("*.py"))
    assert others
    assert not re.search(others, text, re.IGNORECASE)


def test_no_name_is_compared() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "launch").glob("*.s*")]
    assert len(files) > 100
    assert [(file.name, line) for file in files for line in file.read_text().splitlines() if COMPARED.search(line)] == []


def test_a_recipe_with_an_attention_that_the_plan_does_not_count(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is not taken for that of a dense run."""
    monkeypatch.setattr(Toy, "around", "toy")
    words = recipe_words(ROOT / "launch" / "recipes" / "530m-98k.args")
    with pytest.raises(
        ValueError, match="--attention toy is not counted by the plan: use dense or lighthouse or parallax or wall"
    ):
        run_of_words([*words, "--attention", "toy"], DEVICES["h100"])
    with pytest.raises(ValueError, match="--attention lighthouse --lighthouse-around toy is not counted by the plan"):
        run_of_words([*words, "--attention", "lighthouse", "--lighthouse-around", "toy"], DEVICES["h100"])
