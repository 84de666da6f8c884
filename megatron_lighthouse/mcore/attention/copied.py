"""A spec's copy, to be changed freely. Imports no Megatron."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from typing import Any


def copied[T](spec: T) -> T:
    """A spec, and those in it: dataclasses, lists and dicts. A dataclass in several places is one in the copy.

    What they name stays what it is: where Transformer Engine is missing, its classes are mocks, which deepcopy chokes on.
    """
    return _copied(spec, {})


def _copied(value: Any, known: dict[int, Any]) -> Any:
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, dict):
        return {name: _copied(part, known) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_copied(part, known) for part in value)
    if isinstance(value, type) or not is_dataclass(value):
        return value
    own = known[id(value)] = copy.copy(value)
    for field in fields(value):
        object.__setattr__(own, field.name, _copied(getattr(value, field.name), known))
    return own
