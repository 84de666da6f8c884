"""WallConfig: the options of Wall."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lighthouse.options import flag_of, option

INTERVAL = flag_of("wall", "telemetry_interval")
PAIRED, TIED = flag_of("wall", "paired_gates"), flag_of("wall", "tied_gates")
TURNED = ("rope", "yarn")
"""Positions by which the two channels of a pair are turned by one angle a token."""
KERNELS = ("auto", "triton", "reference")
WRONG_IN_FP16 = "in fp16 their gradients were wrong on an H200 (bf16 works)"
"""Why the kernels do not run."""


@dataclass(frozen=True)
class WallConfig:
    """Options of Wall, checked when constructed."""

    kernels: str = option(
        "auto",
        "'triton' for the kernels, 'reference' for plain PyTorch; 'auto' takes the kernels where a GPU had them right.",
        KERNELS,
    )
    """What attends along the diagonal."""

    gate_bias: float = option(
        8.0,
        "What the bias of linear_g, and of linear_gs, begins with: a channel has faded to 1/e after e^bias tokens. To begin "
        "near dense attention, use ln(sequence length) + 2 or more.",
    )
    """Gates are logsigmoid(x W + bias). The authors take 8."""

    gate_max: float = option(
        0.0,
        "Clamp channels' gates softly, as m expm1(g / m), so that none is below -m (Tilde: 0.86). Default: 0, not at all.",
    )
    """The most that a token can make a channel fade; 0: any."""

    tied_gates: bool = option(
        False,
        "One gate for all query heads of a key/value head, so that context parallelism sends no more than of dense attention. "
        "Not the authors' model.",
    )
    """Whether linear_g has columns of G heads instead of H."""

    paired_gates: bool = option(
        False,
        "One gate for the two channels of a head that RoPE turns together, by which --position-embedding-type rope or yarn can "
        "be. Not the authors' model, which has no positions.",
    )
    """Whether linear_g has D / 2 columns a head instead of D."""

    scalar_gate: bool = option(False, "A gate for each query head beside those of its channels, by linear_gs, as in FoX.")
    """Whether logits have the scalar gate γ."""

    telemetry_interval: int = option(
        0, "Log in every such iteration in how many tokens half of a channel fades, by layer and head. Default: 0, never."
    )
    """Iterations from one log of the gates' half-lives to the next; 0: none."""

    def __post_init__(self) -> None:
        if self.telemetry_interval < 0:
            raise ValueError(f"{INTERVAL} {self.telemetry_interval} must not be negative: use 0 for none, or such as 100.")
        if self.kernels not in KERNELS:
            raise ValueError(f"--wall-kernels {self.kernels} is not known: use {', '.join(KERNELS[:-1])} or {KERNELS[-1]}.")
        if not -40 <= self.gate_bias <= 40:
            raise ValueError(f"--wall-gate-bias {self.gate_bias} must lie between -40 and 40: use such as 8.")
        if not 0 <= self.gate_max < math.inf:
            raise ValueError(f"--wall-gate-max {self.gate_max} must be positive, or 0 for none: use such as 0.86.")
