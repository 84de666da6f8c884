"""What an attention tells Megatron's side, the plan and the scripts of itself. `variants` lists those there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron_lighthouse.lighthouse.geometry import Geometry, Shape
from megatron_lighthouse.lighthouse.remedies import Allowed, Sizes, anything
from megatron_lighthouse.lighthouse.rows import TakesRows
from megatron_lighthouse.lighthouse.sharded.sent import attend_bytes
from megatron_lighthouse.nearest import either, multiples
from megatron_lighthouse.options import as_words
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.shared_out import groups_problem
from megatron_lighthouse.usage import as_flag
from megatron_lighthouse.work import Work

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.lighthouse.rotary import Rotary
    from megatron_lighthouse.running import Telemetry
    from megatron_lighthouse.sequence.documents import Documents
    from megatron_lighthouse.softmax.backends import Attend
    from megatron_lighthouse.softmax.documents import AttendDocuments
    from megatron_lighthouse.softmax.rows import RowKind


@dataclass(frozen=True)
class Stream:
    """One more projection of a layer's input, besides q, k and v: [N, B, H, D], as the queries, unless it says otherwise."""

    name: str
    """In a checkpoint its module is `self_attention.linear_<name>`."""
    rotated: bool = True
    """Whether RoPE rotates it as it does the queries; else it travels with the values, which nothing rotates."""
    per_group: bool = False
    """Whether it has as many heads as keys and values have."""
    per_channel: bool = True
    """Whether a head of it has D columns; else one."""
    paired: bool = False
    """Whether two channels share a column, so that a head has D / 2."""
    init: Callable[[Tensor], Any] | None = None
    """Fills the weight; None: as the model's other projections."""
    bias: float | None = None
    """What its bias begins with; None: it has none."""
    like_queries: bool = False
    """Whether it is normed where the model norms its queries, by a norm of its own, and has a bias where these have one."""
    zero_at_first: bool = False
    """Whether it is 0 in a model that takes the weights of a checkpoint without it: its norm's weight, or else its own."""

    def heads(self, heads: int, groups: int) -> int:
        """Its own, beside so many of queries and of keys."""
        return groups if self.per_group else heads

    def columns(self, heads: int, groups: int, dim: int) -> int:
        """Of its projection."""
        return self.heads(heads, groups) * (1 if not self.per_channel else dim // 2 if self.paired else dim)


def norm_of(stream: Stream) -> str:
    """The module that norms a stream. Megatron sums over tensor-parallel ranks where it reads 'q_layernorm' in a name."""
    return f"{stream.name}_q_layernorm"


@dataclass(frozen=True)
class Place:
    """Where a layer stands: all that is known of it when it is built, besides its variant's config and its inputs' shapes."""

    number: int = 1
    """Of the whole model, from 1."""
    exchange: Exchange | None = None
    """The context-parallel ranks that share the sequence."""
    comm_type: str = "p2p"
    scale: float | None = None
    """Of the softmax; 1/sqrt(D) if None."""
    first_head: int = 0
    """This tensor-parallel rank's first query head, of the whole layer's."""
    base_attends: bool = False
    """Whether every call brings an attention over rows: that of the spec's own core attention."""
    discard_output: bool = False
    """Whether the output is to be made again in backward rather than kept."""
    rotary: Rotary | None = None
    """What queries and keys come rotated by, where that is to be known."""
    around: Any = None
    """Where it gathers rows for another attention, the config of that one."""
    value_dim: int | None = None
    """D of the values, where it is not that of the keys: of a variant that is `latent`."""
    window: int | None = None
    """Tokens that a token sees, itself among them, of a variant that has `windows`; None: all."""
    sinks: bool = False
    """Whether every call brings a sink for each head, [H], which only a variant that takes them is asked for."""
    past_alone: bool = False
    """Whether no output may rest on a later row, be it by rounding."""


DEFAULT_PLACE = Place()


class Layer(Protocol):
    """What a variant builds: it decides nothing, and only computes."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *streams: Tensor, attend: Attend | None = None
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """Queries [N, B, H, D], keys and values [N, B, G, D], streams as each says; and `sinks` [H], where the place has any.

        Returns:
            [N, B, H, D]; and what makes it again, without autograd, where it need not be kept for backward: else None.
        """


class DocumentLayer(Protocol):
    """What a variant builds for rows of packed documents, each of which is to be as if it were alone."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
        documents: Documents,
        attend: AttendDocuments | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """As a `Layer`, of one row: N is the tokens of all documents, B = 1."""


def beyond_softmax(model: Any, windows: bool = False) -> Iterator[str]:
    """Options of a model (a TransformerConfig) by which its attention is more than a causal softmax over all tokens."""
    names = (*([] if windows else ["window_size"]), "qk_clip", "log_max_attention_logit")
    yield from (as_words(as_flag(name), value) for name in names if (value := getattr(model, name, None)))


class Variant(TakesRows):
    """An attention. What is not overridden is right for one that sees all tokens and refuses what it does not know."""

    name: str
    """In `--attention`, and in its flags `--<name>-…`."""
    title: str
    """In sentences."""
    help: str
    """Of `--attention`: what it is, beginning with a verb."""
    config: type | None = None
    """A frozen dataclass of `options.option` fields, which raises ValueError where they do not go together."""
    native = False
    """Whether it is Megatron's own core attention, in whose place nothing is put."""
    streams: tuple[Stream, ...] = ()
    """All that it may have, whatever its config."""
    position: str | None = None
    """The --position-embedding-type that `make train` gives it; None: the preset's."""
    dense_weights = True
    """Whether a dense model may take its weights, less those of its streams."""
    switches = False
    """Whether layers may be dense at the model's ends, and become so in stage 2: `--lighthouse-dense-first` and those after."""
    windows = False
    """Whether layers may see a window alone (`--window-size`); else those of a model that do stay dense."""
    copies_groups = False
    """Whether tensor-parallel ranks may have the same key/value head, as Megatron gives them where there are fewer of these."""
    latent = False
    """Whether values may have another width than keys, as those of MLA."""
    selects = False
    """Whether its layers attend to gathered rows, those of `cost`, instead of all tokens."""
    logs = False
    """Whether its layers record what its `telemetry` logs; its config then has a `telemetry_interval`."""
    counted = False
    """Whether the plan knows its time and memory, by its `work`."""

    def telemetry(self, config: Any) -> Telemetry:
        """What its layers record, where it `logs`."""
        raise NotImplementedError

    def work(self, config: Any, shape: Shape) -> Work:
        """What it takes beside softmax attention, for inputs of this shape; `config` is None for its defaults."""
        return Work()

    def base_attends(self, config: Any, of_te: bool, local: bool) -> bool:
        """Whether the spec's core attention, Transformer Engine's or Megatron's local one, attends to this one's rows."""
        return False

    def dropout_problems(self, dropout: float) -> Iterator[str]:
        """Why it cannot train with this attention dropout."""
        if dropout:
            yield f"--attention-dropout {dropout} is not done by --attention {self.name}: use --attention-dropout 0."

    def length_problems(self, config: Any, seq_length: int, ranks: int, allowed: Allowed = anything) -> Iterator[str]:
        """Why so many tokens do not fit, on so many context-parallel ranks; of sizes of its own, those that are allowed."""
        if ranks > 1 and seq_length % (2 * ranks):
            near = multiples(seq_length, 2 * ranks, lambda n: allowed(Sizes(1, 1, 1, 1, n, ranks)))
            yield (
                f"--seq-length {seq_length} must be a multiple of {2 * ranks}, two chunks for each of "
                f"--context-parallel-size {ranks}: use {either(near or [2 * ranks])}."
            )

    def remarks(self, config: Any, args: Any) -> Iterator[str]:
        """What to say at the start of a training run, of Megatron's arguments."""
        yield from ()

    def streams_of(self, config: Any) -> tuple[Stream, ...]:
        """Those that its layers have with this config."""
        return self.streams

    def position_problems(self, config: Any, kind: str | None) -> Iterator[str]:
        """Why it cannot be in a model with this --position-embedding-type, where that is known."""
        yield from ()

    def is_turned(self, config: Any) -> bool:
        """Whether RoPE turns its queries and keys, for the plan."""
        return self.position != "none"

    def rotary_option(self, config: Any) -> str | None:
        """The option by which its layers must know what RoPE turns (`Place.rotary`); None where they need not."""
        return None

    def problems(self, config: Any, model: Any) -> Iterator[str]:
        """Why it cannot be in this model, a TransformerConfig of Megatron, each with what would work."""
        yield from self.dropout_problems(model.attention_dropout)
        for option in beyond_softmax(model):
            yield f"{option} is not done by --attention {self.name}: leave it out, or use --attention dense."
        if getattr(model, "softmax_type", "vanilla") != "vanilla":
            yield f"--softmax-type {model.softmax_type} is not done by --attention {self.name}: use --softmax-type vanilla."

    def groups_problems(self, model: Any) -> Iterator[str]:
        """Why tensor-parallel ranks cannot share out the key/value heads of a model, a TransformerConfig of Megatron."""
        if message := groups_problem(model, self.copies_groups):
            yield message

    def document_problems(self, config: Any, ranks: int) -> Iterator[str]:
        """Why its layers cannot keep packed documents apart, on so many context-parallel ranks."""
        yield (
            f"--dataloader-inter-document-masking packs documents, which --attention {self.name} does not keep apart: leave it "
            "out, or use --attention dense."
        )

    def graph_problems(self, config: Any, seq_length: int, ranks: int, graphs: str) -> Iterator[str]:
        """Why --cuda-graph-impl `graphs` cannot capture it; `length_problems` has none."""
        yield from ()

    def check_installed(self, config: Any, inputs: RowKind, place: Place) -> None:
        """Raises ValueError, before training starts, where a package that it needs is missing."""

    def build(self, config: Any, query: Tensor, key: Tensor, place: Place) -> Layer:
        """The layer for inputs like these, of which shapes, dtype and device count. Raises ValueError where it cannot be."""
        raise NotImplementedError

    def build_documents(self, config: Any, query: Tensor, key: Tensor, place: Place) -> DocumentLayer:
        """The layer for rows like these, where `document_problems` has none. Raises ValueError where it cannot be."""
        raise NotImplementedError

    def base(self, config: Any) -> Variant:
        """What its layers are where they do not select, and whose streams they have; itself, if it selects nothing."""
        return self

    def base_in(self, args: Any) -> Variant:
        """The same, of arguments, those of an older checkpoint among them."""
        return self

    def cost(self, config: Any, seq_length: int, ranks: int) -> Geometry:
        """What is gathered, where it `selects`. Raises ValueError where a length does not fit."""
        raise NotImplementedError

    def sent(
        self, config: Any, seq_length: int, shape: Shape, layout: Layout, comm_type: str, around: Any = None
    ) -> dict[str, tuple[int, int]]:
        """(forward, backward) bytes that a rank sends in one layer, by purpose; `around` is the config of the attention that it
        gathers rows for, None for its defaults."""
        return {"attend": attend_bytes(comm_type, seq_length, shape, layout)}

    def rows_sent(
        self, config: Any, rows: int, shape: Shape, layout: Layout, comm_type: str, past_alone: bool = False
    ) -> dict[str, tuple[int, int]]:
        """The same while it attends to so many gathered rows of all ranks; `config` is None for its defaults; see `Place`."""
        return self.sent(config, rows, shape, layout, comm_type)

    def summary(self, config: Any, seq_length: int, shape: Shape, ranks: int, comm_type: str, around: Any = None) -> str:
        """The same in one line, for the start of a run: what the busiest rank sends in a layer and step."""
        plans = [self.sent(config, seq_length, shape, Layout(ranks, rank), comm_type, around) for rank in range(ranks)]
        most = max(sum(forward + backward for forward, backward in plan.values()) for plan in plans)
        return f"{self.name}: context parallel {ranks}: a rank sends {most / 1e6:,.1f} MB in a layer and step by {comm_type}."
