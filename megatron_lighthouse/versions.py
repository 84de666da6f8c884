"""Releases of other packages: which number is installed, and from which on it can be trusted."""

from __future__ import annotations

import platform
import sys
from datetime import date
from importlib import metadata

import torch
from packaging.version import InvalidVersion, Version

LEAST = {
    "flash-attn-4": ("flash_attn.cute", "4.0.0b31"),
    "flash-linear-attention": ("fla", "0.6.0"),
}
"""Module, and least release. FlashAttention 4: beta 12 and 13 mend its deterministic backward (flash-attention 2510, 2549), and
beta 31 the gradients of more than 128 channels on Hopper (2482, 2662, 2888); `softmax.names.HOPPER` has what is not mended.
flash-linear-attention: before 0.6.0 offsets overflow 32 bits."""


def too_old(package: str) -> str | None:
    """Why the installed release of `package`, which is there, cannot be used, as the end of a sentence; None where it can."""
    module, least = LEAST[package]
    found = _installed(package) or getattr(sys.modules.get(module), "__version__", None)
    if found is None:
        return f"is installed, but does not say which release it is: pip install '{package}>={least}'"
    try:
        is_old = Version(found) < Version(least)
    except InvalidVersion:
        return f"is installed as {found}, which is no version: pip install '{package}>={least}'"
    return f"is installed as {found}, and is right from {least} on: pip install -U '{package}>={least}'" if is_old else None


def environment() -> dict[str, object]:
    """Device, versions and date: what every result must name."""
    versions = {name: _installed(name) for name in ("torch", "triton", "megatron-core", "transformer-engine", "flash-attn-4")}
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "python": platform.python_version(),
        "cudnn": cudnn(),
        **{name: version for name, version in versions.items() if version},
    }


def cudnn() -> int | None:
    """The release that torch uses; None where another than torch's own was loaded first, which it refuses to name."""
    try:
        return torch.backends.cudnn.version()
    except RuntimeError:
        return None


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
