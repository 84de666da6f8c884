"""Lighthouse Attention (arXiv 2605.06554) for Megatron-core: faster long-context pre-training."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 12):  # noqa: UP036, for it is run by other interpreters too
    raise ImportError(
        f"megatron_lighthouse needs Python 3.12 or newer, and {sys.executable} is {sys.version.split()[0]}: use the one that "
        "`make train` makes, .venv/bin/python."
    )

if TYPE_CHECKING:
    from megatron_lighthouse.lighthouse.attention import lighthouse_attention, lighthouse_select
    from megatron_lighthouse.lighthouse.config import LighthouseConfig
    from megatron_lighthouse.lighthouse.rotary import Rotary

__all__ = ["LighthouseConfig", "Rotary", "lighthouse_attention", "lighthouse_select"]
__version__ = "0.1.0"

_WHERE = {
    **dict.fromkeys(("lighthouse_attention", "lighthouse_select"), "lighthouse.attention"),
    "LighthouseConfig": "lighthouse.config",
    "Rotary": "lighthouse.rotary",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: torch takes seconds, which no program's --help need wait for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
