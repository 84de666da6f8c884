"""What source text reads of Megatron's arguments. `python -m tests.mcore.upstream_reads pretrain_gpt.py` lists a script's."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path


def reads(source: str, of: str = "args") -> set[str]:
    """Names read as `args.NAME`, `get_args().NAME`, or by getattr or hasattr of either; of another variable too."""
    return {*_reads(_nodes(source), of)} if of in source else set()


KINDS = (ast.Attribute, ast.Call, ast.Constant, ast.keyword)
"""Nodes that matter: a fifth of all."""


@lru_cache(1)
def _nodes(source: str) -> list[ast.AST]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, KINDS)]


def _reads(nodes: list[ast.AST], variable: str) -> Iterator[str]:
    for node in nodes:
        match node:
            case ast.Attribute(value=of, attr=str(name), ctx=ast.Load()):
                pass
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[of, ast.Constant(value=str(name)), *_]):
                pass
            case _:
                continue
        if _is(of, variable):
            yield name


def _is(node: ast.expr, variable: str) -> bool:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name == variable
        case ast.Call(func=ast.Name(id=name)):
            return name == f"get_{variable}"
    return False


def mentions(source: str) -> set[str]:
    """Attributes read of anything, and short texts, by which fields of a configuration are read; not where a parser is told."""
    found, nodes = set(), _nodes(source)
    told = {id(node.value) for node in nodes if isinstance(node, ast.keyword) and node.arg == "dest"}
    for node in nodes:
        match node:
            case ast.Attribute(attr=name, ctx=ast.Load()):
                found.add(name)
            case ast.Constant(value=str(name)) if name.isidentifier() and id(node) not in told:
                found.add(name)
    return found


if __name__ == "__main__":
    print("\n".join(sorted(reads(Path(sys.argv[1]).read_text()))))
