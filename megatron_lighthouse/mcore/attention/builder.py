"""What builds a core attention when it is called, in both ways in which Megatron has one built.

`Attention` calls what the layer spec has. MLA has `build_module` make it, a second time and with other arguments, which takes a
class or what names one: so a builder names a class, too, that is never made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Called:
    """In whose place stands what the builder makes."""

    def __new__(cls, builder: Callable[..., Any], **kwargs: Any) -> Any:
        return builder(**kwargs)


class Builder:
    """Callable; and, for `build_module`, what a ModuleSpec has."""

    module = _Called

    @property
    def params(self) -> dict[str, Any]:
        return {"builder": self}
