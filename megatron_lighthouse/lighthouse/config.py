"""LighthouseConfig: every option of the attention, and the rules it must satisfy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_lighthouse.lighthouse.around import AROUND
from megatron_lighthouse.lighthouse.by_length import NAMES, by_length
from megatron_lighthouse.lighthouse.causal_rules import causal_problem
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.lighthouse.packed.rule import Rule, rule_problem
from megatron_lighthouse.lighthouse.remedies import Allowed, Sizes, anything, budget_problem, lengths, others
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.options import flag_of, option
from megatron_lighthouse.softmax.names import INNER

STEPS = ("auto", "kernels", "reference")
"""What `steps` can name."""
AUTO = "auto"
"""The scorer that a model asks for, on the command line."""


def flag(name: str) -> str:
    """The command-line flag of the config field `name`."""
    return flag_of("lighthouse", name)


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
                raise ValueError(f"config.{field.name} {value!r} must be of type {field.type}, not {type(value).__name__}.")
        if self.levels < 2:
            raise ValueError(
                f"config.levels {self.levels} must be at least 2 (one is dense attention): use 3 to 5, as the paper."
            )
        if self.pooling < 2:
            raise ValueError(f"config.pooling {self.pooling} must be at least 2: use 2, 4 or 8, as the paper.")
        if problem := budget_problem(self.sizes()):
            raise ValueError(problem)
        for name, known in (("scorer", SCORERS), ("inner", INNER), ("steps", STEPS), ("around", AROUND)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"config.{name} {value!r} is not known: use {' or '.join(map(repr, known))}.")

        if problem := AROUND[self.around].rows_problem(self.inner):
            raise ValueError(problem)
        if self.heads_per_selection < 0:
            raise ValueError(f"config.heads_per_selection {self.heads_per_selection} must not be negative: use 1.")
        if problem := rule_problem(self) or causal_problem(self):
            raise ValueError(problem)

    @property
    def rule(self) -> Rule:
        """What packed documents go by."""
        windows = self.document_tile // self.pooling ** (self.levels - 1) or 4 * self.tile_budget
        return Rule(self.levels, self.pooling, self.tile_budget, windows, self.whole_below)

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

    def sizes(self, seq_length: int = 0, ranks: int = 1) -> Sizes:
        """Those that decide whether it fits N tokens on C ranks."""
        return Sizes(self.levels, self.pooling, self.budget, self.tile_budget, seq_length, ranks)

    def geometry(self, seq_length: int, context_parallel: int = 1, allowed: Allowed = anything) -> Geometry:
        """The integers of this config at a sequence length of `seq_length` tokens (N), on `context_parallel` ranks (C).

        Args:
            allowed: what else refuses sizes: none that it does is offered.

        Raises ValueError where N does not divide into tiles of whole windows, where a tile has fewer coarsest windows than its
        budget, or where tokens or rows do not divide into 2C equal chunks.
        """
        sizes, scorer = self.sizes(seq_length, context_parallel), SCORERS[self.scorer]
        window, tiles, chunks = sizes.window, self.budget // self.tile_budget, sizes.chunks

        def use() -> str:
            return others(sizes, lambda tried: scorer.takes(tried.seq_length, tried.ranks) and allowed(tried))

        if sizes.refined % chunks:
            raise ValueError(
                f"cp_group.size() {context_parallel} deals the gathered rows into {chunks} equal chunks, and "
                f"config.levels {self.levels} with config.pooling {self.pooling} and config.budget {self.budget} "
                f"refines into {sizes.refined} rows, no multiple of it: use {use()}."
            )
        if seq_length < 1 or seq_length % (tiles * window):
            raise ValueError(
                f"query's N {seq_length} must be a multiple of {tiles * window} (budget {self.budget} / tile budget "
                f"{self.tile_budget} = {tiles} tiles of whole windows of {window} tokens): use {use()}."
            )
        if seq_length % (chunks * window):
            raise ValueError(
                f"cp_group.size() {context_parallel} cuts the sequence into {chunks} chunks of whole windows of "
                f"{window} tokens, so query's N {seq_length} must be a multiple of {chunks * window}: use {use()}."
            )
        if seq_length < window * self.budget:
            raise ValueError(
                f"config.budget {self.budget} refines more windows than the {seq_length // window} windows of {window} "
                f"tokens that query's N {seq_length} has: use {use()}."
            )
        return Geometry(seq_length, self.levels, self.pooling, self.budget, self.tile_budget)

    def scorer_problem(self, seq_length: int, context_parallel: int, allowed: Allowed) -> str | None:
        """Why the scorer cannot rank so many tokens on so many ranks, with lengths that all rules take."""
        scorer = SCORERS[self.scorer]
        if scorer.takes(seq_length, context_parallel):
            return None
        unit = scorer.multiple(context_parallel)
        return scorer.problem(seq_length, context_parallel, lengths(self.sizes(seq_length, context_parallel), allowed, unit))

    def replace(self, **changes: object) -> LighthouseConfig:
        """A copy with `changes`, checked again."""
        return replace(self, **changes)  # type: ignore[arg-type]
