"""Modules of the package import each other one way; what a call imports late, for a registry or to start faster, aside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules() -> dict[str, Path]:
    """By name."""
    found = {}
    for folder, name in (
        (ROOT / "megatron_lighthouse", "megatron_lighthouse"),
        (ROOT / "kernels", "megatron_lighthouse.kernels"),
    ):
        for path in folder.rglob("*.py"):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """What importing a module imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        yield from imported(node)


def test_modules_import_each_other_one_way() -> None:
    paths = modules()
    graph = {name: set(imported(ast.parse(path.read_text()))) & paths.keys() - {name} for name, path in paths.items()}
    packages = {name for name, path in paths.items() if path.stem == "__init__"}
    # a name taken of a package is a module of it, or of the package itself
    arrows = {
        name: {other for other in others if other not in packages or not any(x.startswith(f"{other}.") for x in others)}
        for name, others in graph.items()
    }
    assert sum(map(len, arrows.values())) > 1000
    TopologicalSorter(arrows).prepare()  # raises on a cycle, and names it
