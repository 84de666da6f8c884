"""FlashAttention 4 as Transformer Engine calls it.

Transformer Engine writes -1 for a side on which a window does not end, as FlashAttention 2 and 3 read it: causal attention is
(-1, 0). FlashAttention 4 took that so up to 4.0.0b29. From b30 on it is a window that holds no key, and Transformer Engine
2.20.2 still asks for it: every layer attends to nothing, and nothing says so (findings/).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron_lighthouse.notice import say_once

MODULE, RESOLVE = "flash_attn.cute.interface", "_resolve_causal_local_window"
"""Where FlashAttention 4 decides, forward and backward, what a window hides."""
SWITCH = "NVTE_FLASH_ATTN_V4"
UNBOUNDED_CAUSAL = (True, -1, 0)


def mend() -> None:
    """Have FlashAttention 4 read a negative side as one that does not end, if Transformer Engine may call it; said once.

    To be called when Transformer Engine is imported, which imports it. One that decides elsewhere is kept from being called.
    """
    interface = sys.modules.get(MODULE)
    if interface is None or "transformer_engine" not in sys.modules or os.environ.get(SWITCH) == "0":
        return
    resolve: Any = getattr(interface, RESOLVE, None)
    local = is_local(resolve)
    if local is None:
        os.environ[SWITCH] = "0"
        say_once(
            f"lighthouse: {SWITCH}=0: whether this FlashAttention 4 attends to what Transformer Engine asks for is not known. "
            "--lighthouse-inner fa4 calls it otherwise."
        )
    elif local:
        setattr(interface, RESOLVE, reading(resolve))
        say_once(
            "lighthouse: this FlashAttention 4 would attend to nothing where Transformer Engine asks for causal attention, "
            "by the window (-1, 0): in this run -1 leaves a window open."
        )


def is_local(resolve: Callable[..., Any]) -> bool | None:
    """Whether it takes causal attention without an end for a window; None where it cannot be asked."""
    try:
        _, local, *_ = resolve(*UNBOUNDED_CAUSAL)
    except Exception:  # none of this name, or a function of others
        return None
    return bool(local)


def reading(resolve: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but for negative sides."""
    signature = inspect.signature(resolve)
    sides = [*signature.parameters][1:3]

    @wraps(resolve)
    def resolved(*args: Any, **named: Any) -> Any:
        given = signature.bind(*args, **named)
        given.arguments |= {side: None for side in sides if (given.arguments.get(side) or 0) < 0}
        return resolve(*given.args, **given.kwargs)

    return resolved
