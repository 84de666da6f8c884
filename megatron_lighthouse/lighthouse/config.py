"""LighthouseConfig: every option of the attention, and the rules it must satisfy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

from megatron_lighthouse.lighthouse.around import AROUND
from megatron_lighthouse.lighthouse.by_length import NAMES, by_length
from megatron_lighthouse.lighthouse.causal_rules import causal_problem
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.lighthouse.packed.rule import Rule, rule_problem
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.options import flag_of, option
from megatron_lighthouse.softmax.names import INNER

STEPS = ("auto", "kernels", "reference")
"""What `steps` can name."""
AUTO = "auto"
"""The scorer that a model asks for, on the command line."""
TRIED = 1000
"""Values that are tried each way from one that does not work: trying all takes hours where a length is far too great."""


def flag(name: str) -> str:
    """The command-line flag of the config field `name`."""
    return flag_of("lighthouse", name)


def named(name: str) -> str:
    """What a caller of the library knows the field `name` as."""
    return f"config.{name}"


@dataclass(frozen=True)
class LighthouseConfig:
    """Options of Lighthouse Attention (arXiv 2605.06554), checked when constructed.

    Raises ValueError, naming the field, its value, the rule and values that would work.
    """

    levels: int = option(3, "Levels of the pyramid (L), the tokens themselves being the finest.", by_length=True)
    """Levels of the pyramid (L), the input itself being level 0. A coarsest window holds pooling^(levels-1) tokens."""

    pooling: int = option(4, "Pooling factor (p) from one level to the next.")
    """Pooling factor (p) from one level to the next. The kernels are made for 2 to 16: at 32 they run out of registers."""

    budget: int = option(
        1536,
        "Entries refined per level and key/value head (k). The attended length is seq/p^(L-1) + (L-1)*p*k.",
        by_length=True,
    )
    """Entries refined per level and key/value head (k). The gathered length is N/p^(L-1) + (L-1)*p*k."""

    tile_budget: int = option(
        128, "Entries refined per level within one tile (m); the sequence has budget/tile-budget tiles.", by_length=True
    )
    """Entries refined per level within one tile (m). The sequence has budget/tile_budget tiles."""

    scorer: str = option(
        "norm",
        "What ranks the entries: 'norm' takes the L2 norms of queries and keys, 'mass' the softmax weight that the coarsest "
        "windows give each other, 'summary' attention over these, 'dilated' attention over every fourth token, 'gla' gated "
        "linear attention over those. 'auto': 'mass' where the model norms queries and keys, else 'norm'; what goes on from a "
        "checkpoint takes the checkpoint's.",
        SCORERS,
        by_model=AUTO,
    )
    """What ranks the entries: 'norm' takes the L2 norms of the queries and of the keys; 'dilated' those of the outputs of
    attention among every fourth token, both ways; 'gla' the same by gated linear attention (on a GPU it needs
    flash-linear-attention); 'summary' attends among the coarsest windows, and takes 'norm' for the finer ones; 'mass' takes the
    softmax weight that the coarsest windows give each other, and serves where queries and keys are normed."""

    heads_per_selection: int = option(
        0,
        "Key/value heads of a tensor-parallel rank that share one selection, by the sum of their scores. Default: 1; with "
        "--multi-latent-attention as many as leave 16 selections of all the model's heads.",
    )
    """Key/value heads that share one selection, made by the sum of their scores (ours): each still attends for itself. 0: 1."""

    inner: str = option(
        "auto",
        "The attention over the gathered rows. 'auto': Transformer Engine's in its layer spec, else the fastest of "
        "FlashAttention 4 or 3, cuDNN and FlashAttention 2 that is there and takes the dtype and head dimension. Another name "
        "forces that one.",
        INNER,
    )
    """The attention over the gathered rows: 'auto' takes the fastest that is there (Transformer Engine's in its own layer
    spec); 'te', 'fa4', 'fa3', 'cudnn', 'fa2' and 'sdpa' force one. See `megatron_lighthouse.softmax.backends`."""

    around: str = option(
        "softmax",
        "What attends to the gathered rows, and what a layer is where it does not select, in stage 2 and at the model's ends: "
        "'softmax', or another attention, whose further projections are pooled and gathered as the queries are.",
        AROUND,
    )
    """The attention over the gathered rows, of those that offer themselves (`lighthouse.around`): 'softmax', or another, for
    which `lighthouse_attention` is given its streams."""

    steps: str = option(
        "auto",
        "What runs the steps around the inner attention: the Triton 'kernels', or plain PyTorch as a 'reference'; 'auto' "
        "takes the kernels on a GPU.",
        STEPS,
    )
    """What runs the steps around it: 'kernels' (Triton), 'reference' (plain PyTorch, what the kernels are held to), or 'auto':
    the kernels on a GPU."""

    pin_first: bool = option(
        True,
        "Always refine the first window, so that the first positions have an output. Default: on; the authors' code "
        "behaves as with --no-lighthouse-pin-first.",
    )
    """Always refine the first window, so that every position has an output (the authors' code leaves
    the first p^(L-1)-1 positions zero wherever it does not happen to select that window)."""

    causal_selection: bool = option(
        False,
        "Let no later token decide what is refined: by queries a window is refined before it begins, by keys it is refined for "
        "the tokens after it. Default: off; what goes on from a checkpoint takes the checkpoint's.",
        by_checkpoint=True,
    )
    """Let no later token decide what is refined, so that no output depends on one: see `lighthouse.causal` (ours)."""

    document_tile: int = option(
        0,
        "Tokens of a tile where documents are packed, each with the tile budget; a document's last tile is shorter. Default: "
        "four coarsest windows for each entry of the tile budget.",
    )
    """Tokens of a tile in packed documents (`cu_seqlens`): the budget goes by a document's length. 0: 4*m*p^(L-1), a quarter of
    the coarsest windows being refined, as with the other defaults at 98,304 tokens."""

    whole_below: int = option(
        0,
        "Packed documents of fewer tokens go in whole, as dense attention. Default: those alone that would not become fewer "
        "rows.",
    )
    """Packed documents of fewer tokens go in whole, exactly as dense attention. Those that would not become fewer rows always
    do. The default awaits measurement."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = {"str": str, "bool": bool, "int": int}[str(field.type)]
            if type(value) is not kind:
                raise ValueError(f"{named(field.name)} {value!r} must be of type {field.type}, not {type(value).__name__}.")
        if self.levels < 2:
            raise ValueError(
                f"{named('levels')} {self.levels} must be at least 2 (one level is dense attention); the paper uses 3 to 5."
            )
        if self.pooling < 2:
            raise ValueError(f"{named('pooling')} {self.pooling} must be at least 2; the paper uses 2, 4 and 8.")
        if self.tile_budget < 2 or self.tile_budget % 2:
            raise ValueError(
                f"{named('tile_budget')} {self.tile_budget} must be even and positive, for half of it goes to the queries' "
                f"choice and half to the keys': use {self._other_tile_budgets()}."
            )
        if self.budget < 1 or self.budget % self.tile_budget:
            below, above = self._neighbours(self.budget, self.tile_budget)
            choices = f"{below} or {above}" if below > 0 else f"{self.tile_budget}, or a smaller tile budget"
            raise ValueError(
                f"{named('budget')} {self.budget} must be a positive multiple of {named('tile_budget')} {self.tile_budget}: "
                f"use {choices}."
            )
        for name, known in (("scorer", SCORERS), ("inner", INNER), ("steps", STEPS), ("around", AROUND)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{named(name)} {value!r} is not known: use {' or '.join(map(repr, known))}.")

        if problem := AROUND[self.around].rows_problem(self.inner):
            raise ValueError(problem)
        if self.heads_per_selection < 0:
            raise ValueError(f"{named('heads_per_selection')} {self.heads_per_selection} must not be negative: use 1.")
        if problem := rule_problem(self) or causal_problem(self):
            raise ValueError(problem)

    @property
    def rule(self) -> Rule:
        """What packed documents go by."""
        windows = self.document_tile // self.pooling ** (self.levels - 1) or 4 * self.tile_budget
        return Rule(self.levels, self.pooling, self.tile_budget, windows, self.whole_below)

    @staticmethod
    def _neighbours(value: int, unit: int) -> tuple[int, int]:
        return value // unit * unit, (value // unit + 1) * unit

    @classmethod
    def for_length(cls, seq_length: int, **given: Any) -> LighthouseConfig:
        """The config that `seq_length` tokens ask for (`by_length`), with the fields that are given.

        Raises ValueError as the constructor does.
        """
        if type(seq_length) is not int or seq_length < 1:
            raise ValueError(f"seq_length {seq_length!r} must be a whole number of at least 1.")
        pooling = given.get("pooling", cls.pooling)
        found = by_length(seq_length, pooling, **{name: given[name] for name in NAMES if name in given})
        return cls(**{**given, **found})

    def geometry(self, seq_length: int, context_parallel: int = 1) -> Geometry:
        """The integers of this config at a sequence length of `seq_length` tokens (N), on `context_parallel` ranks (C).

        Raises ValueError where N does not divide into tiles of whole windows, where a tile has fewer coarsest windows than its
        budget, or where tokens or rows do not divide into 2C equal chunks.
        """
        window, tiles, chunks = self.pooling ** (self.levels - 1), self.budget // self.tile_budget, _chunks(context_parallel)
        geometry = Geometry(seq_length, self.levels, self.pooling, self.budget, self.tile_budget)
        if (refined := self._refined(self.budget)) % chunks:
            raise ValueError(
                f"cp_group.size() {context_parallel} deals the gathered rows into {chunks} equal chunks, and "
                f"{named('levels')} {self.levels} with {named('pooling')} {self.pooling} and {named('budget')} {self.budget} "
                f"refines into {refined} rows, no multiple of it: use {self._others(seq_length, context_parallel)}."
            )
        if seq_length < 1 or seq_length % (tiles * window):
            raise ValueError(
                f"query's N {seq_length} must be a multiple of {tiles * window} (budget {self.budget} / tile budget "
                f"{self.tile_budget} = {tiles} tiles of whole windows of {window} tokens): "
                f"use {self._others(seq_length, context_parallel)}."
            )
        if seq_length % (chunks * window):
            raise ValueError(
                f"cp_group.size() {context_parallel} cuts the sequence into {chunks} chunks of whole windows of "
                f"{window} tokens, so query's N {seq_length} must be a multiple of {chunks * window}: use "
                f"{self._others(seq_length, context_parallel)}."
            )
        if seq_length < window * self.budget:
            raise ValueError(
                f"{named('budget')} {self.budget} refines more windows than the {seq_length // window} windows of {window} "
                f"tokens that query's N {seq_length} has: use {self._others(seq_length, context_parallel)}."
            )
        return geometry

    def _refined(self, budget: int) -> int:
        """Gathered rows but for the coarsest: (L-1)*p*k."""
        return (self.levels - 1) * self.pooling * budget

    def _unit(self, ranks: int, tiles: int) -> int:
        """What a sequence length must be a multiple of: whole windows in each tile and in each chunk."""
        return math.lcm(tiles, _chunks(ranks)) * self.pooling ** (self.levels - 1)

    def _fits(self, seq_length: int, ranks: int, budget: int = 0, tile_budget: int = 0) -> bool:
        """Whether a length is right, with other budgets where they are given. In integers alone: it is asked of thousands."""
        budget, tile_budget = budget or self.budget, tile_budget or self.tile_budget
        least, unit = self.pooling ** (self.levels - 1) * budget, self._unit(ranks, budget // tile_budget)
        return seq_length >= least and seq_length % unit == 0 and self._refined(budget) % _chunks(ranks) == 0

    def _others(self, seq_length: int, ranks: int) -> str:
        """The nearest settings that would work, budgets first: of each kind up to two, every one tried against all rules."""
        unit, window = self._unit(ranks, self.budget // self.tile_budget), self.pooling ** (self.levels - 1)
        below, above = self._neighbours(seq_length, unit)
        least = self._neighbours(window * self.budget - 1, unit)[1]
        lengths = [n for n in (below, above) if self._fits(n, ranks)] or [n for n in (least,) if self._fits(n, ranks)]
        windows = max(0, seq_length) // window
        budgets = _nearest(self.budget, self.tile_budget, windows, lambda k: self._fits(seq_length, ranks, k))
        offers = [_either(named("budget"), budgets) or self._pair(seq_length, ranks), _either("query's N", lengths)]
        if ranks > 1:
            sizes = _nearest(ranks, 1, windows // 2, lambda n: self._fits(seq_length, n))
            offers.append(_either("cp_group.size()", sizes))
        return ", or ".join(filter(None, offers)) or "other sizes"

    def _pair(self, seq_length: int, ranks: int) -> str:
        """A budget and a tile budget that work, where no budget does with this tile budget."""
        found = by_length(max(1, seq_length), self.pooling, self.levels)
        pairs = [(found["budget"], found["tile_budget"]), *((m, m) for m in (64, 32, 16, 8, 4, 2) if m < self.tile_budget)]
        for k, m in pairs:
            if self._fits(seq_length, ranks, k, m):
                return f"{named('budget')} {k} {named('tile_budget')} {m}"
        return ""

    def _other_tile_budgets(self) -> str:
        """The even divisors of the budget that lie nearest; where there is none, a pair that works."""
        best = _either(named("tile_budget"), _nearest(self.tile_budget, 2, self.budget, lambda m: self.budget % m == 0))
        return best or f"{named('budget')} 1536 {named('tile_budget')} 128"

    def replace(self, **changes: object) -> LighthouseConfig:
        """A copy with `changes`, checked again."""
        return replace(self, **changes)  # type: ignore[arg-type]


def _chunks(ranks: int) -> int:
    """Chunks of the sequence that `ranks` context-parallel ranks hold: two each, or all of it as one."""
    return 2 * ranks if ranks > 1 else 1


def _nearest(to: int, unit: int, most: int, fits: Callable[[int], bool]) -> list[int]:
    """The two multiples of `unit`, at most `most`, that fit and lie nearest to `to`, which does not; of TRIED each way."""
    middle = min(to, most) // unit * unit
    near = range(max(unit, middle - TRIED * unit), min(most, middle + TRIED * unit) + 1, unit)
    return sorted(islice(filter(fits, sorted(near, key=lambda n: abs(n - to))), 2))


def _either(name: str, values: list[int]) -> str:
    return f"{name} " + " or ".join(str(v) for v in values) if values else ""
