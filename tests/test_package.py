"""The package as it is installed: by `make test` as an editable install, by users as a wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

import megatron_lighthouse


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


def test_the_mathematics_does_not_import_megatron() -> None:
    root = Path(megatron_lighthouse.__file__).parent
    folders = [root / name for name in ("lighthouse", "softmax", "sequence", "context_parallel")]
    files = [*root.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    assert len(files) > 30
    for file in files:
        if file.name != "pretrain_gpt.py":
            assert "megatron.core" not in file.read_text(), file
