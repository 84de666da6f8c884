"""LighthouseConfig: every option of the attention, and the rules it must satisfy."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from megatron_lighthouse.geometry import Geometry
from megatron_lighthouse.inner import INNER
from megatron_lighthouse.scorers import SCORERS
from megatron_lighthouse.steps import STEPS


def flag(name: str) -> str:
    """The command-line flag of the config field `name`."""
    return "--lighthouse-" + name.replace("_", "-")


@dataclass(frozen=True)
class LighthouseConfig:
    """Options of Lighthouse Attention (arXiv 2605.06554), checked when constructed.

    Raises ValueError, naming the flag, its value, the rule and values that would work.
    """

    levels: int = 3
    """Levels of the pyramid (L), the input itself being level 0. A coarsest window holds pooling^(levels-1) tokens."""

    pooling: int = 4
    """Pooling factor (p) from one level to the next."""

    budget: int = 1536
    """Entries refined per level and key/value head (k). The gathered length is N/p^(L-1) + (L-1)*p*k."""

    tile_budget: int = 128
    """Entries refined per level within one tile (m). The sequence has budget/tile_budget tiles."""

    scorer: str = "norm"
    """What ranks the entries: 'norm' takes the L2 norms of the queries and of the keys; 'dilated' those of the outputs of
    attention among every fourth token, both ways; 'gla' the same by gated linear attention (on a GPU it needs
    flash-linear-attention); 'summary' attends among the coarsest windows, and takes 'norm' for the finer ones."""

    inner: str = "auto"
    """The attention over the gathered rows: 'auto' takes the fastest that is there (Transformer Engine's in its own layer
    spec); 'te', 'fa4', 'fa3', 'cudnn', 'fa2' and 'sdpa' force one. See `megatron_lighthouse.inner`."""

    steps: str = "auto"
    """What runs the steps around it: 'kernels' (Triton), 'reference' (plain PyTorch, what the kernels are held to), or 'auto':
    the kernels on a GPU."""

    pin_first: bool = True
    """Always refine the first window, so that every position has an output (the authors' code leaves
    the first p^(L-1)-1 positions zero wherever it does not happen to select that window)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = {"str": str, "bool": bool, "int": int}[str(field.type)]
            if type(value) is not kind:
                raise ValueError(f"{flag(field.name)} {value!r} must be of type {field.type}, not {type(value).__name__}.")
        if self.levels < 2:
            raise ValueError(
                f"{flag('levels')} {self.levels} must be at least 2 (one level is dense attention: use --attention dense "
                f"for that); the paper uses 3 to 5."
            )
        if self.pooling < 2:
            raise ValueError(f"{flag('pooling')} {self.pooling} must be at least 2; the paper uses 2, 4 and 8.")
        if self.tile_budget < 2 or self.tile_budget % 2:
            raise ValueError(
                f"{flag('tile_budget')} {self.tile_budget} must be even and positive, for half of it goes to the queries' "
                f"choice and half to the keys': use {self._other_tile_budgets()}."
            )
        if self.budget < 1 or self.budget % self.tile_budget:
            below, above = self._neighbours(self.budget, self.tile_budget)
            choices = f"{below} or {above}" if below > 0 else f"{self.tile_budget}, or a smaller tile budget"
            raise ValueError(
                f"{flag('budget')} {self.budget} must be a positive multiple of {flag('tile_budget')} {self.tile_budget}: "
                f"use {choices}."
            )
        for name, known in (("scorer", SCORERS), ("inner", INNER), ("steps", STEPS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{flag(name)} {value!r} is not known: use {' or '.join(map(repr, known))}.")

    @staticmethod
    def _neighbours(value: int, unit: int) -> tuple[int, int]:
        return value // unit * unit, (value // unit + 1) * unit

    def geometry(self, seq_length: int, context_parallel: int = 1) -> Geometry:
        """The integers of this config at a sequence length of `seq_length` tokens (N), on `context_parallel` ranks (C).

        Raises ValueError where N does not divide into tiles of whole windows, where a tile has fewer coarsest windows than its
        budget, or where tokens or rows do not divide into 2C equal chunks.
        """
        unit = self.budget // self.tile_budget * self.pooling ** (self.levels - 1)
        window = self.pooling ** (self.levels - 1)
        if seq_length < 1 or seq_length % unit:
            below, above = self._neighbours(seq_length, unit)
            lengths = [n for n in (below, above) if n >= window * self.budget] or [window * self.budget]
            raise ValueError(
                f"--seq-length {seq_length} must be a multiple of {unit} (budget {self.budget} / tile budget "
                f"{self.tile_budget} = {self.budget // self.tile_budget} tiles of whole windows of {window} tokens): "
                f"use {_either('--seq-length', lengths)}{self._other_budgets(seq_length)}."
            )
        if seq_length < window * self.budget:
            raise ValueError(
                f"{flag('budget')} {self.budget} refines more windows than the {seq_length // window} windows of {window} "
                f"tokens that --seq-length {seq_length} has: use --seq-length {window * self.budget} or more"
                f"{self._other_budgets(seq_length)}."
            )
        geometry = Geometry(seq_length, self.levels, self.pooling, self.budget, self.tile_budget)
        if context_parallel > 1:
            self._check_chunks(geometry, context_parallel)
        return geometry

    def _check_chunks(self, geometry: Geometry, ranks: int) -> None:
        """Tokens come in 2C chunks of whole windows, and so do the gathered rows."""
        seq_length, chunks = geometry.seq_length, 2 * ranks
        window = geometry.window(self.levels - 1)
        if seq_length % (chunks * window):
            lengths = [n for n in self._neighbours(seq_length, self._unit(chunks)) if n >= window * self.budget]
            raise ValueError(
                f"--context-parallel-size {ranks} cuts the sequence into {chunks} chunks of whole windows of {window} tokens, "
                f"so --seq-length {seq_length} must be a multiple of {chunks * window}: use "
                f"{_either('--seq-length', lengths)}, or {self._other_ranks(geometry, ranks)}."
            )
        if geometry.gathered_length % chunks:
            raise ValueError(
                f"--context-parallel-size {ranks} deals the gathered rows into {chunks} equal chunks, and {flag('levels')} "
                f"{self.levels} with {flag('pooling')} {self.pooling} and {flag('budget')} {self.budget} gathers "
                f"{geometry.gathered_length}: use {self._other_ranks(geometry, ranks)}, or a budget that is a multiple "
                f"of {chunks}."
            )

    def _other_ranks(self, geometry: Geometry, ranks: int) -> str:
        """'--context-parallel-size …' with the nearest numbers of ranks that fit; 1 always does."""
        refined = (self.levels - 1) * self.pooling * self.budget
        windows = geometry.entries(self.levels - 1)
        fits = [n for n in range(1, windows // 2 + 1) if windows % (2 * n) == 0 and refined % (2 * n) == 0]
        best = sorted(sorted(fits or [1], key=lambda n: abs(n - ranks))[:2])
        return _either("--context-parallel-size", best)

    def _unit(self, chunks: int) -> int:
        """What a sequence length must be a multiple of: of tiles of whole windows, and of chunks of these."""
        return math.lcm(self.budget // self.tile_budget, chunks) * self.pooling ** (self.levels - 1)

    def _other_budgets(self, seq_length: int) -> str:
        """', or --lighthouse-budget …' with the nearest budgets that fit `seq_length`; '' where there is none."""
        window = self.pooling ** (self.levels - 1)
        fits = [
            k
            for k in range(self.tile_budget, seq_length // window + 1, self.tile_budget)
            if seq_length % (k // self.tile_budget * window) == 0
        ]
        best = sorted(sorted(fits, key=lambda k: abs(k - self.budget))[:2])
        if best:
            return f", or {_either(flag('budget'), best)}"
        for tile_budget in (64, 32, 16, 8, 4, 2):
            if tile_budget < self.tile_budget and seq_length % window == 0 and tile_budget * window <= seq_length:
                return f", or {flag('budget')} {tile_budget} {flag('tile_budget')} {tile_budget}"
        return ""

    def _other_tile_budgets(self) -> str:
        """The even divisors of the budget that lie nearest; where there is none, a pair that works."""
        fits = [m for m in range(2, self.budget + 1, 2) if self.budget % m == 0]
        best = sorted(sorted(fits, key=lambda m: abs(m - self.tile_budget))[:2])
        return _either(flag("tile_budget"), best) if best else f"{flag('budget')} 1536 {flag('tile_budget')} 128"

    def replace(self, **changes: object) -> LighthouseConfig:
        """A copy with `changes`, checked again."""
        return replace(self, **changes)  # type: ignore[arg-type]


def _either(name: str, values: list[int]) -> str:
    return f"{name} " + " or ".join(str(v) for v in values)
