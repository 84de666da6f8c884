"""The package as it is installed: by `make test` as an editable install, by users as a wheel."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import megatron_lighthouse
from megatron_lighthouse import needed

ROOT = Path(__file__).parents[1]


def test_kernels_import_as_part_of_the_package() -> None:
    kernels = importlib.import_module("megatron_lighthouse.kernels")
    assert Path(kernels.__file__ or "").parent.name == "kernels"


def test_version_and_requirements() -> None:
    installed = importlib.metadata.distribution("megatron_lighthouse")
    assert installed.version == megatron_lighthouse.__version__
    required = " ".join(installed.requires or [])
    assert "megatron-core" in required
    # on PyPI the one is an unrelated package, the other a placeholder
    assert not {"apex", "nvidia-dlprof"} & set(required.split())


def test_the_version_stands_in_one_place_and_what_repeats_it_is_held_to_it() -> None:
    version = megatron_lighthouse.__version__
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]
    assert re.findall(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    assert "arXiv:2605.06554" in (ROOT / "CITATION.cff").read_text()
    assert not re.search(r"\d+\.\d+\.\d+", (ROOT / "setup.py").read_text().split("MEGATRON")[0])


def test_megatron_is_an_extra_that_others_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    setuptools = SimpleNamespace(setup=lambda **options: given.update(options), find_packages=lambda *_, **__: [])
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    runpy.run_path(str(ROOT / "setup.py"))
    training = set(given["extras_require"]["megatron"])
    assert {line.split(">")[0] for line in training} == set(needed.MEGATRON.values())
    assert not training & set(given["install_requires"])
    assert all(training <= set(given["extras_require"][extra]) for extra in ("te", "test"))
    assert '-e ".[megatron,test]"' in (ROOT / "Makefile").read_text()


WITHOUT_MEGATRON = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron", "psutil", "tqdm", "tensorboard", "transformer_engine"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch
from megatron_lighthouse import LighthouseConfig, lighthouse_attention, lighthouse_select
config = LighthouseConfig(levels=2, pooling=4, budget=4, tile_budget=2)
x = torch.randn(64, 1, 2, 8, requires_grad=True)
lighthouse_attention(x, x, x, config).sum().backward()
assert x.grad.isfinite().all() and lighthouse_select(x, x, config).shape == (1, 2, 32)
import megatron_lighthouse.plan.__main__, megatron_lighthouse.profiling.__main__
from megatron_lighthouse import pretrain_gpt
from megatron_lighthouse.recipe import evaluate, recovery, two_stage
for program in (pretrain_gpt.main, evaluate.main, lambda: two_stage.main([]), lambda: recovery.main(["."])):
    try:
        program()
    except SystemExit as stop:
        assert stop.code == 2
"""


def test_the_library_needs_no_megatron_and_programs_ask_for_it_by_name() -> None:
    """Of one interpreter in which it is missing."""
    ran = subprocess.run([sys.executable, "-c", WITHOUT_MEGATRON], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stderr.splitlines() if " needs " in line]
    assert len(lines) == 4
    for line in lines[:3]:
        assert "needs megatron-core, psutil, tqdm, tensorboard: pip install '.[megatron]'" in line
    assert "recovery needs tensorboard: pip install" in lines[3]


def test_the_mathematics_does_not_import_megatron() -> None:
    root = Path(megatron_lighthouse.__file__).parent
    folders = [root / name for name in ("lighthouse", "softmax", "sequence", "context_parallel")]
    files = [*root.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    assert len(files) > 30
    for file in files:
        if file.name not in ("pretrain_gpt.py", "needed.py"):  # these ask whether it is there
            assert "megatron.core" not in file.read_text(), file


def test_an_older_python_is_told_which_one_to_take() -> None:
    source = (ROOT / "megatron_lighthouse" / "__init__.py").read_text()
    ast.parse(source, feature_version=(3, 8))
    with (
        mock.patch.object(sys, "version_info", (3, 11, 9)),
        pytest.raises(ImportError, match=r"needs Python 3\.12 .*make train"),
    ):
        exec(compile(source, "__init__.py", "exec"), {"__name__": "megatron_lighthouse"})
