"""What a program needs that the library does not: asked for by name, in one line, before anything is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec

MEGATRON = {"megatron.core": "megatron-core", "psutil": "psutil", "tqdm": "tqdm", "tensorboard": "tensorboard"}
"""Modules of the extra `megatron`, and the packages that bring them."""


def ask_for_megatron(program: str, modules: Iterable[str] = MEGATRON) -> None:
    """End `program` where a package of the extra is missing that brings one of `modules`.

    Raises:
        SystemExit: with 2, what is missing and how it is installed on stderr.
    """
    missing = [MEGATRON[module] for module in modules if not _is_there(module)]
    if missing:
        names = ", ".join(missing)
        print(f"{program} needs {names}: pip install '.[megatron]' in a clone of megatron_lighthouse.", file=sys.stderr)
        raise SystemExit(2)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False
