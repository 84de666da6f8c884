"""The scripts of benchmarks/ and experiments/: listed where one looks for them, and no two that import each other."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from megatron_lighthouse.variants import VARIANTS

ROOT = Path(__file__).parents[1]


def test_each_script_is_listed() -> None:
    folder = ROOT / "benchmarks"
    scripts = {path.name for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    scripts |= {path.name for path in folder.glob("*.sh")}
    assert len(scripts) >= 13
    listed = [line.split("`")[1] for line in (folder / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert sorted(listed) == sorted(scripts)


def test_each_module_of_the_experiments_is_listed() -> None:
    modules = {path.name for path in (ROOT / "experiments").glob("*.py") if not path.name.startswith("__")}
    text = (ROOT / "experiments" / "README.md").read_text()
    assert not {name for name in modules if f"`{name}`" not in text}


def imported(path: Path, names: set[str]) -> set[str]:
    """Those of `names`, modules beside `path`, that it imports anywhere in it, under their own name or their package's."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & {name.removeprefix(f"{path.parent.name}.") for name in found}


def test_imports_go_one_way() -> None:
    for folder, least in (("benchmarks", 15), ("experiments", 10)):
        paths = {path.stem: path for path in (ROOT / folder).glob("*.py")}
        graph = {name: imported(path, paths.keys() - {name}) for name, path in paths.items()}
        assert sum(map(len, graph.values())) >= least
        TopologicalSorter(graph).prepare()  # raises on a cycle, and names it


def printed(script: str, *words: str) -> list[str]:
    """What it prints, its kernels interpreted."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()


def test_every_attention_is_sanitized() -> None:
    names = printed("sanitize.py", "--list")
    ours = {variant.name for variant in VARIANTS.values() if not variant.native}
    assert ours <= {name.partition("-")[0] for name in names}
    around = {variant.around for variant in VARIANTS.values() if variant.around and not variant.native}
    assert {f"around-{name}" for name in around} <= {*names}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["parallax-window", "wall-window", "around-wall"])
def test_a_case_runs(case: str) -> None:
    assert printed("sanitize.py", "--run", case) == [f"{case}:", "done"]


@pytest.mark.slow
def test_documents_over_ranks_launch_little() -> None:
    """Of the host's time most is spent on launches: the deal alone once had a hundred."""
    words = printed("document_host.py", "--only-count")
    forward, backward = (int(words[words.index(way) - 3]) for way in ("forward", "backward"))
    assert 10 < forward <= 28
    assert 10 < backward <= 25


def test_lighthouse_around_wall_launches_little() -> None:
    """Launches are the host's time: with 225 it was busier than an H200."""
    *_, count, _, _ = printed("launches.py")
    assert 70 < int(count) <= 90


PYTHON = """#!/usr/bin/env bash
# stands for pip, for what compiles, and for the import that is tried
words="$*"
case $words in
*pip*--target*) site=${words#*--target } && site=${site%% *}
	mkdir -p "$site/nvidia_cutlass_dsl/dsl_packages/iket" && head -c 1500000 /dev/urandom >"$site/library.so" ;;
*flash_compile.py*) mkdir "${!#}" && echo kernel >"${!#}/kernel.o" ;;
*) [[ -e ${PYTHONPATH%%:*}/library.so ]] ;;
esac
"""


def test_flash_attention_4_travels_in_two_parts(tmp_path: Path) -> None:
    python, script = tmp_path / "python", str(ROOT / "benchmarks" / "flash_attention_4.sh")
    python.write_text(PYTHON)
    python.chmod(0o755)

    def answered(*words: str) -> str:
        done = subprocess.run(
            ["bash", script, *words], capture_output=True, text=True, env={**os.environ, "PYTHON": str(python)}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    answered("pack", str(tmp_path), "1")
    parts = [tmp_path / name / "flash" for name in ("first", "second")]
    assert (parts[0].stat().st_size, parts[1].stat().st_size > 400_000) == (2**20, True)
    to = tmp_path / "there"
    said = answered("unpack", *map(str, parts), str(to)).split()
    assert said[0] == f"FLASH_ATTENTION_4={to}:{to}/nvidia_cutlass_dsl/dsl_packages"
    assert said[2] == f"FLASH_ATTENTION_CUTE_DSL_CACHE_DIR={to}/cache"
    assert sorted(path.name for path in to.iterdir()) == ["cache", "library.so", "nvidia_cutlass_dsl"]
    assert (to / "cache" / "kernel.o").read_text() == "kernel\n"
    assert not (to / "nvidia_cutlass_dsl" / "dsl_packages" / "iket").exists()
