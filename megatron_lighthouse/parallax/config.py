"""ParallaxConfig: the options of Parallax."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lighthouse.options import flag_of, option

INTERVAL = flag_of("parallax", "telemetry_interval")
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

    telemetry_interval: int = option(
        0, "Log in every such iteration how much each layer subtracts from its softmax average. Default: 0, never."
    )
    """Iterations from one log of what each layer subtracts to the next; 0: none."""

    def __post_init__(self) -> None:
        if self.telemetry_interval < 0:
            raise ValueError(f"{INTERVAL} {self.telemetry_interval} must not be negative: use 0 for none, or such as 100.")
        if self.kernels not in KERNELS:
            raise ValueError(f"--parallax-kernels {self.kernels} is not known: use {', '.join(KERNELS[:-1])} or {KERNELS[-1]}.")
