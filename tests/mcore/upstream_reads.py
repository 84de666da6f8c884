"""What source text reads of Megatron's arguments. `python -m tests.mcore.upstream_reads pretrain_gpt.py` lists a script's."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def reads(source: str) -> set[str]:
    """Names read as `args.NAME`, `get_args().NAME`, or by getattr or hasattr of either."""
    return {*_reads(ast.parse(source))}


def _reads(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=of, attr=str(name), ctx=ast.Load()):
                pass
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[of, ast.Constant(value=str(name)), *_]):
                pass
            case _:
                continue
        if _is_args(of):
            yield name


def _is_args(node: ast.expr) -> bool:
    match node:
        case ast.Name(id="args") | ast.Attribute(attr="args") | ast.Call(func=ast.Name(id="get_args")):
            return True
    return False


def mentions(source: str) -> set[str]:
    """Attributes read of anything, and short texts, by which fields of a configuration are read."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name, ctx=ast.Load()):
                found.add(name)
            case ast.Constant(value=str(name)) if name.isidentifier():
                found.add(name)
    return found


if __name__ == "__main__":
    print("\n".join(sorted(reads(Path(sys.argv[1]).read_text()))))
