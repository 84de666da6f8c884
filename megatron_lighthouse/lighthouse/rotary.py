"""Rotary positions of pooled rows: turned on to the last token of their window (the authors' correction, 034aace).

The paper pools rows after RoPE. Their mean then has the phase of no position, and fast channels shrink. With R(j) the rotation
of position j and e the last token of a window, its row is to be R(e) mean(x_j) for raw x_j. Core attention sees R(j) x_j.
Turning each on by e - j before it is averaged gives the same (ours). Within a window e - j is an offset alone, so one small
table serves all windows, whatever positions they stand at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

HALVES, NEIGHBOURS = 1, 2
"""How channels pair, for the kernels: channel i with the one PAIRS channels on, or 2i with 2i+1."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation that queries and keys come with. Make one for a model, not one a call: it keeps its tables.

    Raises:
        ValueError: when constructed, frequencies that are no vector of finite numbers, or a first channel that cannot be.
    """

    inv_freq: Tensor
    """[pairs], radians a token, one for each pair of rotated channels: those that the model applies, scaling included."""
    interleaved: bool = False
    """Pairs are neighbouring channels (2i, 2i+1); else channel i goes with channel i + pairs, as Megatron's default has it."""
    first: int = 0
    """The first rotated channel; channels before it, and after the last pair, carry no position (partial RoPE, MLA)."""
    tables: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.inv_freq, Tensor):
            raise TypeError(f"Rotary: inv_freq must be a torch.Tensor, not a {type(self.inv_freq).__name__}.")
        inv_freq = self.inv_freq.detach().to("cpu", torch.float64)
        if inv_freq.dim() != 1 or not len(inv_freq) or not inv_freq.isfinite().all():
            raise ValueError(f"Rotary: inv_freq must be a vector of finite numbers, one a pair, got {list(inv_freq.shape)}.")
        if self.first < 0 or (self.interleaved and self.first % 2):
            even = "even and " if self.interleaved else ""
            raise ValueError(f"Rotary: first {self.first} must be {even}not negative: use 0 where rotated channels come first.")
        object.__setattr__(self, "inv_freq", inv_freq)

    @property
    def pairs(self) -> int:
        """Pairs of rotated channels."""
        return len(self.inv_freq)

    @property
    def pairing(self) -> tuple[int, int, int]:
        """(how channels pair, pairs, first), for the kernels."""
        return (NEIGHBOURS if self.interleaved else HALVES), self.pairs, self.first

    def problem(self, dim: int) -> str | None:
        """Why rows of `dim` channels cannot be rotated so; None where they can."""
        if self.first + 2 * self.pairs <= dim:
            return None
        after = f" from channel {self.first} on" if self.first else ""
        return f"rotary: {self.pairs} pairs of channels{after} do not fit a head dimension of {dim}: give at most {dim // 2}."

    def turns(self, window: int, device: torch.device) -> Tensor:
        """[window, 2, pairs] fp32: the cosine and the sine by which a row is turned on by 0, 1, … window - 1 tokens."""
        if (window, device) not in self.tables:
            angles = torch.arange(window, dtype=torch.float64).unsqueeze(1) * self.inv_freq
            self.tables[window, device] = torch.stack([angles.cos(), angles.sin()], 1).float().to(device)
        return self.tables[window, device]

    def turn(self, x: Tensor, tokens: Tensor) -> Tensor:
        """`x` turned on by so many `tokens` (back where negative): x [m, n, ..., D] in a dtype of sums, tokens [n] integers."""
        angles = tokens.to("cpu", torch.float64).unsqueeze(1) * self.inv_freq
        angles = angles.view(len(tokens), *[1] * (x.dim() - 3), self.pairs)
        cos, sin = (f.to(x.device, x.dtype) for f in (angles.cos(), angles.sin()))
        step, last = (2, 1) if self.interleaved else (1, self.pairs)
        a, b = (x[..., i::step][..., : self.pairs] for i in (self.first, self.first + last))
        out = x.clone()
        out[..., self.first :: step][..., : self.pairs] = a * cos - b * sin
        out[..., self.first + last :: step][..., : self.pairs] = b * cos + a * sin
        return out
