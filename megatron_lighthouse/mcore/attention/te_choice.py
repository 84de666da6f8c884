"""What Transformer Engine will attend to the gathered rows with, as far as it says before it runs."""

from __future__ import annotations

import os

VERSIONS = (2, 3, 4)
"""Of FlashAttention, which NVTE_FLASH_ATTN_V2, …_V3 and …_V4 turn off (Transformer Engine 2.18)."""


def te_choice(capability: int) -> str:
    """A sentence on its choice, by its own rules: its environment variables (docs/envvars.rst), and the order of its backends.

    Args:
        capability: of the device, times ten; 0 without a GPU.
    """
    wanted = {name: os.environ.get(f"NVTE_{name}_ATTN", "1") != "0" for name in ("FUSED", "FLASH", "UNFUSED")}
    off = [f"NVTE_{name}_ATTN=0" for name, on in wanted.items() if not on]
    versions = {v: os.environ.get(f"NVTE_FLASH_ATTN_V{v}", "1") != "0" for v in VERSIONS}
    left = [str(v) for v, on in versions.items() if on]
    if wanted["FLASH"]:
        off += [f"NVTE_FLASH_ATTN_V{v}=0" for v, on in versions.items() if not on]
    flash = f"FlashAttention {' or '.join(left)}, where it is installed" if wanted["FLASH"] and left else None
    fused = "cuDNN's (NVTE_FUSED_ATTN)" if wanted["FUSED"] else None
    order = [fused, flash] if capability >= 90 or not capability else [flash, fused]
    found = [one for one in order if one] + (["its unfused one, which keeps all scores"] if wanted["UNFUSED"] else [])
    why = f", by {' '.join(off)}" if off else ""
    return (
        f"lighthouse: the inner attention is Transformer Engine's: {'; else '.join(found) or 'none is left'}{why}. "
        "NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 lets it say which."
    )
