"""ParallaxConfig: the options of Parallax."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lighthouse.options import option

KERNELS = ("auto", "triton", "reference")


@dataclass(frozen=True)
class ParallaxConfig:
    """Options of Parallax, checked when constructed."""

    kernels: str = option(
        "auto",
        "'triton' for the kernels, 'reference' for plain PyTorch; 'auto' takes the kernels on a GPU where they can run.",
        KERNELS,
    )
    """What attends."""

    def __post_init__(self) -> None:
        if self.kernels not in KERNELS:
            raise ValueError(f"--parallax-kernels {self.kernels} is not known: use {', '.join(KERNELS[:-1])} or {KERNELS[-1]}.")
