"""Commands of the docs that need no GPU are whole, and start; the table of recipes has all of them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.launch.scripts import LAUNCH, ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def commands(page: Path) -> list[str]:
    """Lines of a page's shell blocks, those that go on joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


TINY = [line for page in PAGES for line in commands(page) if line.startswith("launch/") and "--cluster cpu-test" in line]


def test_there_are_a_run_and_a_study_without_a_gpu() -> None:
    assert {"--study" in line for line in TINY} == {False, True}


@pytest.mark.parametrize("command", TINY)
def test_a_command_that_needs_no_gpu_starts(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    words[words.index("--run") + 1] = str(tmp_path / "run")
    words[words.index("--") : words.index("--")] = ["--only-check", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "check: passed: " in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_is_cut_short(page: Path) -> None:
    """What dots stand for is found by nobody who reads that page alone."""
    assert re.findall(r"`launch/\w+\.sh [^`]*…[^`]*`", page.read_text()) == []


def test_every_recipe_is_in_the_table() -> None:
    page = (ROOT / "docs/launch.md").read_text()
    rows = re.findall(r"^\| ((?:`[\w.-]+`(?:, )?)+) \|", page[page.index("## Recipes") :], re.MULTILINE)
    named = {name for row in rows for name in re.findall("`(.+?)`", row)}
    assert {file.stem for file in (LAUNCH / "recipes").glob("*.args")} <= named
