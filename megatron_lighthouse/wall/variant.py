"""Wall as a variant: what Megatron's side, the plan and the scripts ask of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.rows import number_problem
from megatron_lighthouse.options import as_words
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.variant import Place, Stream, Variant, beyond_softmax
from megatron_lighthouse.wall.config import PAIRED, TIED, TURNED, WRONG_IN_FP16, WallConfig
from megatron_lighthouse.work import Work

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.lighthouse.rotary import Rotary
    from megatron_lighthouse.lighthouse.selection import Selection
    from megatron_lighthouse.running import Telemetry
    from megatron_lighthouse.sequence.documents import Documents
    from megatron_lighthouse.softmax.rows import RowKind
    from megatron_lighthouse.wall.over_documents import PlacedDocuments
    from megatron_lighthouse.wall.pieces import Sight
    from megatron_lighthouse.wall.placed import Placed, Rows


class Wall(Variant):
    """Wall (Tilde Research, 2026): forget gates instead of positions."""

    name, title = "wall", "Wall"
    help = "lets keys fade by gates of each head and channel, linear_g, in place of positions"
    config = WallConfig
    streams = (
        Stream("g", rotated=False, bias=8.0),
        Stream("gs", rotated=False, bias=8.0, per_channel=False),
    )
    dense_weights = False
    windows = copies_groups = True
    position = "none"
    around = "wall"
    counted = logs = True

    def work(self, config: WallConfig | None, shape: Shape) -> Work:
        """Time and what backward holds are an H200's (docs/measured_h200.md), of gates of each query head; the rest is counted.

        An element of fp32 is two of bf16. Kept are the gates' logits and gates, and keys that have faded where they travel; of
        gathered rows gates, and keys of as many heads, and of all tokens logits, gates and keys.
        """
        config = config or WallConfig()
        gates, keys = (shape.groups if config.tied_gates else shape.heads) / shape.heads, shape.groups / shape.heads
        logits = gates / 2 if config.paired_gates else gates
        return Work(
            moved=271,
            moved_both=1563,
            kept=logits + 2 * gates,
            rows_kept=(2 + 1) * gates - keys,
            travelling_kept=gates,
            tokens_kept=logits + 2 * gates + keys,
            backward=11,
            assumed="as its kernels on an H200",
        )

    def telemetry(self, config: WallConfig) -> Telemetry:
        from megatron_lighthouse.wall.telemetry import HalfLives

        return HalfLives(config.tied_gates)

    def streams_of(self, config: WallConfig | None) -> tuple[Stream, ...]:
        config = config or WallConfig()
        tied, paired = config.tied_gates, config.paired_gates
        gate = Stream("g", rotated=False, bias=config.gate_bias, per_group=tied, paired=paired)
        scalar = Stream("gs", rotated=False, bias=config.gate_bias, per_channel=False)
        return (gate, scalar) if config.scalar_gate else (gate,)

    def problems(self, config: WallConfig, model: Any) -> Iterator[str]:
        yield from self.dropout_problems(model.attention_dropout)
        if (size := model.window_size) and (size[0] < 0 or size[1] != 0):
            ours = f"--attention {self.name}"
            given = as_words("--window-size", size)
            yield f"{given} must be n,0 with {ours}, of n >= 0 tokens before a token: use such as 127,0."
        for option in beyond_softmax(model, self.windows):
            yield f"{option} is not done by --attention {self.name}: leave it out, or use --attention dense."
        if config.kernels == "triton" and getattr(model, "fp16", False):
            yield f"--wall-kernels triton cannot run: {WRONG_IN_FP16}. Use auto or reference."
        if config.paired_gates and (dim := getattr(model, "kv_channels", None) or 0) % 2:
            yield f"{PAIRED} is for an even number of channels: use --kv-channels {dim + 1}, not {dim}."
        yield from self.groups_problems(model)
        groups, ranks = model.num_query_groups or model.num_attention_heads, model.tensor_model_parallel_size
        if config.tied_gates and groups < ranks:
            yield (
                f"{TIED} has gates of --num-query-groups {groups}, fewer than --tensor-model-parallel-size {ranks}: leave it "
                f"out, or use --tensor-model-parallel-size {groups}."
            )

    def position_problems(self, config: WallConfig, kind: str | None) -> Iterator[str]:
        said = f"--position-embedding-type {kind} does not go with --attention {self.name}"
        if kind is None or kind in (TURNED if config.paired_gates else (self.position,)):
            return
        if config.paired_gates:
            yield f"{said} {PAIRED}, which is for what turns pairs of channels: use {' or '.join(TURNED)}, or leave it out."
        elif kind in TURNED:
            yield f"{said}, where each channel has its own gate: use {PAIRED}, or --position-embedding-type {self.position}."
        else:
            yield f"{said}, for the gates take their place: use --position-embedding-type {self.position}."

    def is_turned(self, config: WallConfig | None) -> bool:
        return (config or WallConfig()).paired_gates

    def rotary_option(self, config: WallConfig) -> str | None:
        return PAIRED if config.paired_gates else None

    def document_problems(self, config: WallConfig, ranks: int) -> Iterator[str]:
        yield from ()

    def remarks(self, config: WallConfig, args: Any) -> Iterator[str]:
        each = math.log1p(math.exp(-config.gate_bias))
        yield (
            f"wall: --wall-gate-bias {config.gate_bias:g}: at first a channel fades to 1/e in {1 / each:,.0f} tokens, and to "
            f"{math.exp(-each * args.seq_length):.2g} over --seq-length {args.seq_length}."
        )

    def build(self, config: WallConfig, query: Tensor, key: Tensor, place: Place) -> Placed:
        from megatron_lighthouse.wall.placed import placed

        return placed(config, query, key, place)

    def build_documents(self, config: WallConfig, query: Tensor, key: Tensor, place: Place) -> PlacedDocuments:
        from megatron_lighthouse.wall.over_documents import PlacedDocuments
        from megatron_lighthouse.wall.placed import placed

        def attend(sight: Sight, query: Tensor, key: Tensor, *rows: Tensor, sinks: Tensor | None) -> Any:
            return placed(config, query, key, place, sight)(query, key, *rows, sinks=sinks)

        return PlacedDocuments(attend, place.exchange)

    def check_installed(self, config: WallConfig, inputs: RowKind, place: Place) -> None:
        from megatron_lighthouse.wall.implementations import makers_for

        makers_for(config.kernels, inputs.device, inputs.dtype, (inputs.dim, inputs.value_dim))

    def sent(
        self, config: WallConfig | None, seq_length: int, shape: Shape, layout: Layout, comm_type: str, around: Any = None
    ) -> dict[str, tuple[int, int]]:
        from megatron_lighthouse.wall.sent import sent

        config = config or WallConfig()
        own = (config.tied_gates, config.scalar_gate)
        return sent(comm_type, seq_length, shape, layout, *own, paired=config.paired_gates)

    def rotary_problem(self) -> str:
        return (
            f"rotary: config.around {self.around} fades keys to their window's end, and turns none: leave `rotary` out. "
            "Rotated queries and keys must come with gates that the two channels of a pair share."
        )

    def streams_problem(
        self, config: WallConfig | None, query: Tensor, key: Tensor, streams: Sequence[Tensor], exchange: Exchange | None
    ) -> str | None:
        """Signs are looked at by one rank on a CPU: see `wall_attention`."""
        from torch.compiler import is_compiling

        config = config or WallConfig()
        wanted = self.streams_of(config)
        if message := number_problem(self.around, wanted, streams):
            return f"{message} Scalar gates are read with around=WallConfig(scalar_gate=True)."
        shapes = (query.shape[:2] + (key if config.tied_gates else query).shape[2:3] + query.shape[3:], (*query.shape[:3], 1))
        for stream, x, shape in zip(wanted, streams, shapes, strict=False):
            if x.shape != shape or not x.dtype.is_floating_point or x.device != query.device:
                return (
                    f"streams: {stream.name} of config.around {self.around} must be {tuple(shape)}, floating, on "
                    f"{query.device}, got {tuple(x.shape)} {x.dtype} on {x.device}: with gates of a group, "
                    "around=WallConfig(tied_gates=True)."
                )
            looks = exchange is None and x.device.type == "cpu" and not is_compiling()
            if looks and not bool((x <= 0).all()):
                return f"streams: {stream.name} of config.around {self.around} must be natural logarithms <= 0: use logsigmoid."
        return None

    def of_projections(
        self, config: WallConfig, streams: tuple[Tensor, ...], rotary: Rotary | None = None
    ) -> tuple[Tensor, ...]:
        from megatron_lighthouse.wall import telemetry
        from megatron_lighthouse.wall.gates import LogSigmoid, of_channels

        gate, *scalar = streams
        gate = of_channels(config, rotary)(gate)
        telemetry.record(gate)
        return gate, *map(LogSigmoid(), scalar)

    def gather(
        self,
        take: Callable[..., tuple[Tensor, ...]],
        selection: Selection,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
    ) -> tuple[Tensor, ...]:
        from megatron_lighthouse.wall.gathered import gather

        return gather(take, selection, query, key, value, *streams)

    def row_bytes(self, config: WallConfig | None, shape: Shape) -> int:
        config, wide = config or WallConfig(), max(4, shape.itemsize)
        gates = shape.groups if config.tied_gates else shape.heads
        given = (shape.heads + gates) * shape.dim + shape.groups * shape.values
        of_gates = gates * shape.dim + (shape.heads if config.scalar_gate else 0)
        return shape.batch * (given * shape.itemsize + of_gates * wide)

    def rows_sent(
        self, config: WallConfig | None, rows: int, shape: Shape, layout: Layout, comm_type: str, past_alone: bool = False
    ) -> dict[str, tuple[int, int]]:
        from megatron_lighthouse.wall.sent import sent

        config, wide = config or WallConfig(), max(4, shape.itemsize)
        return sent(comm_type, rows, shape, layout, config.tied_gates, config.scalar_gate, wide, gathered=True)

    def build_rows(self, inner: str, query: Tensor, key: Tensor, place: Place) -> Rows:
        from megatron_lighthouse.wall.placed import rows

        value = key[..., :1].expand(*key.shape[:3], place.value_dim or key.shape[3])
        return rows(query, key, value, place)

    def build_document_rows(self, inner: str, query: Tensor, key: Tensor, place: Place) -> Callable[..., Tensor]:
        from megatron_lighthouse.wall.over_documents import sight_of
        from megatron_lighthouse.wall.placed import rows

        alone = replace(place, comm_type="p2p")  # for one rank, which no scheme concerns

        def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, *streams: Tensor) -> Tensor:
            return rows(query, value, value, alone, sight_of(documents))(query, key, value, *streams)

        return attend


WALL = Wall()
