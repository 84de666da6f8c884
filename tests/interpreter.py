"""Triton's interpreter without the work that it repeats, the same results in a fraction of the time; and one mend of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

NOTHING = SimpleNamespace(restore=lambda: None)


@cache
def quicken() -> None:
    """For this process, whose kernels are only interpreted; once, for a rank may be a fork of one that did.

    A release of Triton that names it otherwise is left as it is.
    """
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _once_a_module(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _once_a_type(interpreter._get_np_dtype)
    if all(hasattr(core.block_type, name) for name in ("with_element_ty", "get_block_shapes")):
        _make_each_type_once(core.block_type)
        core.tensor.__init__ = _shape_once_a_type(core.tensor.__init__)
        for kind in (core.dtype, core.block_type):
            kind.__eq__ = _seen_at_once(kind.__eq__)
    if hasattr(TritonSemantic, "broadcast_impl_value"):
        TritonSemantic.broadcast_impl_value = _unless_alike(TritonSemantic.broadcast_impl_value)
    if hasattr(interpreter.InterpreterBuilder, "create_splat"):
        interpreter.InterpreterBuilder.create_splat = _conditions_stay(interpreter.InterpreterBuilder.create_splat)
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


def _make_each_type_once(block_type: Any) -> None:
    make, known = block_type.__init__, {}

    def made(cls: Any, element: Any, shape: Any) -> Any:
        key = (element.name, getattr(element, "address_space", 0), *(getattr(size, "value", size) for size in shape))
        if key not in known:
            kind = object.__new__(cls)
            make(kind, element, shape)
            known[key] = kind
        return known[key]

    block_type.__new__ = made
    block_type.__init__ = lambda *_: None


def _shape_once_a_type(make: Callable[..., None]) -> Callable[..., None]:
    """A tensor's shape and size are of its type."""

    def make_quickly(tensor: Any, handle: Any, kind: Any) -> None:
        known = vars(kind).get("of_tensors")
        if known is None:
            make(tensor, handle, kind)
            kind.of_tensors = (tensor.shape, tensor.numel)
        else:
            tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
            tensor.shape, tensor.numel = known

    return make_quickly


def _seen_at_once(equals: Callable[..., bool]) -> Callable[..., bool]:
    return lambda kind, other: kind is other or equals(kind, other)


def _unless_alike(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def broadcast_others(semantic: Any, a: Any, b: Any) -> Any:
        alike = a.type is b.type or (a.type.is_block() and b.type.is_block() and a.type.shape.values == b.type.shape.values)
        return (a, b) if alike else broadcast(semantic, a, b)

    return broadcast_others


def _conditions_stay(splat: Callable[..., Any]) -> Callable[..., Any]:
    """A scalar condition becomes int32 in a block, no mask for Triton 3.9: findings/triton_interpreter_scalar_mask.sh."""

    def splat_condition(builder: Any, kind: Any, scalar: Any) -> Any:
        block = splat(builder, kind, scalar)
        if scalar.data.dtype == bool:
            block.data = block.data.astype(bool)
        return block

    return splat_condition
