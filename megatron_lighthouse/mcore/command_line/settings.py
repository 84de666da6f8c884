"""Settings: what a run asks of Lighthouse, and the command-line arguments that say so. Imports no Megatron."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatron_lighthouse.lighthouse.config import AUTO, LighthouseConfig, flag
from megatron_lighthouse.lighthouse.remedies import Sizes, budget_problem
from megatron_lighthouse.mcore.command_line import documents, pyramid, rope, scorer, stage
from megatron_lighthouse.mcore.command_line.layers import attention_layers
from megatron_lighthouse.options import add_options, in_flags, read_options
from megatron_lighthouse.variant import Stream, Variant
from megatron_lighthouse.variants import DENSE, LIGHTHOUSE, VARIANTS

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

ENVIRONMENT = "LIGHTHOUSE_ARGS"
"""Where `--spec` finds the arguments in an unpatched Megatron, whose parser does not know them."""


@dataclass(frozen=True)
class LighthouseSettings:
    """The attention's own options, and which layers take it."""

    config: Any = field(default_factory=LighthouseConfig)
    dense_first: int = 2
    """Of the layers that attend to all tokens, how many at the bottom of the model stay dense."""
    dense_last: int = 2
    """How many of them at the top stay dense."""
    discard_output: bool = True
    """Whether a layer's output is scattered again in backward rather than kept: see `mcore.attention.output`."""
    schedule: stage.Schedule | None = None
    """When Lighthouse layers are dense; None where another job does that, or none."""
    rope: str = rope.LAST
    """Whether pooled queries and keys stand at their window's last token, or at the mean of its tokens: see `rope`."""
    edge_budget: int | None = None
    """Where given, the first and last layers are Lighthouse too, with this budget in place of the config's."""
    attention_layers: tuple[int, ...] | None = None
    """The numbers, from 1, of the model's layers that attend to all tokens, or to windows too; None where all do."""
    variant: str = LIGHTHOUSE.name
    """Of `--attention`: whose `config` it is."""
    around: Any = None
    """Where its layers select for another attention, the config of that one; None for its defaults, or where it has none."""

    @property
    def attention(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def base(self) -> Variant:
        """What a layer is that does not select, by the schedule or by its place; its streams are those of all layers."""
        return self.attention.base(self.config)

    @property
    def base_config(self) -> Any:
        """The config of `base`."""
        return self.config if self.base is self.attention else self.around

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Those of its layers."""
        return self.base.streams_of(self.base_config)

    def at_first(self, layer_number: int, num_layers: int) -> tuple[Variant, Any]:
        """What a layer that holds attention begins as, and the config of that."""
        if self.is_dense(layer_number, num_layers):
            return self.base, self.base_config
        return self.attention, self.config_of(layer_number, num_layers)

    def in_model(self, model: Any) -> LighthouseSettings:
        """These, as the model (a TransformerConfig) has them: less layers that do not attend to all tokens, and with as many
        heads a selection as it asks for."""
        full, own = attention_layers(model, self.attention.windows), self
        if getattr(self.config, "heads_per_selection", 1) == 0:
            own = replace(own, config=self.config.replace(heads_per_selection=heads_per_selection(model)))
        if full is None or full == self.attention_layers:
            return own
        return replace(own, attention_layers=tuple(n for n in full if n in self.holding(max(full, default=0))))

    def is_dense(self, layer_number: int, num_layers: int, iteration: int | None = None) -> bool:
        """Whether the layer of this global, 1-based number is dense in this iteration; without one, whether it always is.

        One that holds no attention, or sees a window alone, is as a dense one.
        """
        dense = 0 if iteration is None else self.dense_by_now(num_layers, iteration)
        return layer_number not in self.numbers(num_layers)[dense:]

    def numbers(self, num_layers: int) -> tuple[int, ...]:
        """The numbers of the layers that begin with Lighthouse."""
        return self._inner(num_layers) if self.edge_budget is None else self.holding(num_layers)

    def _inner(self, num_layers: int) -> tuple[int, ...]:
        """The numbers of the layers that attend to all tokens, less the first and last of them."""
        holding = self.holding(num_layers)
        return holding[max(0, self.dense_first) : max(0, len(holding) - max(0, self.dense_last))]

    def config_of(self, layer_number: int, num_layers: int) -> LighthouseConfig:
        """The config of a Lighthouse layer."""
        return self.config if layer_number in self._inner(num_layers) else self.edge or self.config

    @property
    def edge(self) -> LighthouseConfig | None:
        """The config of the first and last layers; None where they are dense.

        Raises:
            ValueError: an edge budget that cannot be.
        """
        if self.edge_budget is None:
            return None
        try:
            return self.config.replace(budget=self.edge_budget)
        except ValueError as error:
            raise ValueError(of_edge(str(error))) from None

    def holding(self, num_layers: int) -> tuple[int, ...]:
        """The numbers of the layers that attend to all tokens."""
        return tuple(range(1, num_layers + 1)) if self.attention_layers is None else self.attention_layers

    def lighthouse_layers(self, num_layers: int) -> int:
        """How many of the model's layers begin with Lighthouse."""
        return len(self.numbers(num_layers))

    def dense_by_now(self, num_layers: int, iteration: int) -> int:
        """How many of those are dense in this iteration."""
        return self.schedule.dense_layers(iteration, self.lighthouse_layers(num_layers)) if self.schedule else 0


def of_edge(message: str) -> str:
    """What a config says of its budget, said of the edge layers'."""
    return in_flags(message).replace(flag("budget") + " ", flag("edge_budget") + " ")


SELECTIONS = 16
"""At least as many as this are left of a model's heads where these share selections: what 16 heads make."""


def heads_per_selection(model: Any) -> int:
    """By default: 1; with MLA, whose heads each have keys of their own, as many as leave SELECTIONS, on any number of ranks."""
    heads = model.num_attention_heads
    if not getattr(model, "multi_latent_attention", False):
        return 1
    return max(n for n in range(1, max(1, heads // SELECTIONS) + 1) if heads % n == 0)


def head_dims(config: Any) -> tuple[int, int]:
    """Channels of a query or key, and of a value."""
    if getattr(config, "multi_latent_attention", False):
        return config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
    dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    return dim, dim


def heads_of_rank(config: TransformerConfig) -> tuple[int, int]:
    """Query heads and key/value heads of one tensor-parallel rank, where these are fewer one that others have too. In MLA each
    query head has keys of its own."""
    heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
    groups = heads if getattr(config, "multi_latent_attention", False) else groups
    return heads // config.tensor_model_parallel_size, max(1, groups // config.tensor_model_parallel_size)


def own_comm_types(config: TransformerConfig, settings: LighthouseSettings) -> list[str]:
    """The schemes by which this project's own attention crosses ranks; none where Transformer Engine's does it."""
    of_te = config.transformer_impl == "transformer_engine"
    if config.context_parallel_size == 1 or (of_te and settings.attention.base_attends(settings.config, True, False)):
        return []
    return comm_types_of(config)


def comm_types_of(config: TransformerConfig) -> list[str]:
    """The schemes of the layers, each once."""
    kinds = config.cp_comm_type or "p2p"
    return [kinds] if isinstance(kinds, str) else sorted(set(kinds))


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--attention` and each attention's own flags to Megatron's parser."""
    group = parser.add_argument_group("lighthouse", "Lighthouse Attention (arXiv 2605.06554)")
    group.add_argument(
        "--attention",
        choices=list(VARIANTS),
        default=DENSE.name,
        help="Core attention of the GPT layers. " + "; ".join(f"'{v.name}' {v.help}" for v in VARIANTS.values()) + ".",
    )
    group.add_argument(
        "--drop-attention-weights",
        action="store_true",
        help="Take the weights of a checkpoint of another attention although it has some that this one does not know, such as "
        "linear_r of Parallax, linear_g of Wall, norms of queries and keys, or sinks: what they did is lost.",
    )
    add_options(group, LIGHTHOUSE.name, LighthouseConfig)
    group.add_argument(
        flag("discard_output"),
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Free a layer's output after its projection, and scatter it again in backward: the same bits for as much less "
        "memory as the queries take. Default: on; turn it off where adapters or hooks read the projection's input.",
    )
    for name, where in (("dense_first", "bottom"), ("dense_last", "top")):
        group.add_argument(
            flag(name),
            type=int,
            default=2,
            help=f"Layers at the {where} of the model that stay dense, of those that attend to all tokens, counted over the "
            "whole model whatever the pipeline layout. Default: %(default)s.",
        )
    group.add_argument(
        flag("edge_budget"),
        type=int,
        metavar="K",
        help="Make these layers Lighthouse too, with this budget of their own, so that no layer is quadratic. Default: dense.",
    )
    rope.add_arguments(group)
    stage.add_arguments(group)
    for variant in VARIANTS.values():
        if variant.config and variant is not LIGHTHOUSE:
            add_options(parser.add_argument_group(variant.name, variant.title), variant.name, variant.config)
    return parser


def settings_by_spec(args: argparse.Namespace) -> LighthouseSettings:
    """Those of a run whose `--spec` names Lighthouse: a checkpoint that goes on keeps its own, and the next one holds them.

    Args:
        args: Megatron's; where its parser knew none of ours, they get what the environment says.

    Raises:
        ValueError: as `settings_from`.
    """
    if not hasattr(args, "lighthouse_levels"):
        vars(args).update(vars(_of_environment()), lighthouse_environment=os.environ.get(ENVIRONMENT))
    pyramid.settle(args)
    return rope.settled(args, settings_from(args))


def _of_environment() -> argparse.Namespace:
    parser = add_arguments(argparse.ArgumentParser(prog=ENVIRONMENT, allow_abbrev=False))
    return parser.parse_args(shlex.split(os.environ.get(ENVIRONMENT, "")))


def settings_from(args: argparse.Namespace | None) -> LighthouseSettings:
    """Settings from parsed arguments, or from the environment where the parser did not know them.

    Where --attention is dense they are Lighthouse's, which a spec may have named. Levels and budgets that are not given follow
    the length of `args`, where it is known (`pyramid`), and the scorer the model (`scorer`).

    Raises:
        ValueError: a setting that cannot be, naming the flag and values that would work; options in the environment beside a
            parser that knows them.
    """
    length, model = getattr(args, "seq_length", None), args
    if args is not None and hasattr(args, "lighthouse_levels"):
        given = os.environ.get(ENVIRONMENT)
        if given and given != getattr(args, "lighthouse_environment", None):
            raise ValueError(
                f"{ENVIRONMENT} {given!r} is for a parser that does not know --lighthouse-* options, and this one does: unset "
                "it, and put them on the command line."
            )
    else:
        args = _of_environment()
    variant = VARIANTS[args.attention]
    holding = attention_layers(model, variant.windows)
    if variant.config and not variant.switches:
        config = read_options(args, variant.name, variant.config)
        return LighthouseSettings(config, 0, 0, False, attention_layers=holding, variant=variant.name)
    args = argparse.Namespace(**{**vars(args), **pyramid.sizes(args, length)})
    if args.lighthouse_scorer == AUTO:
        args.lighthouse_scorer = scorer.of_model(model)
    _check_budgets(args, length)
    config = read_options(args, LIGHTHOUSE.name, LighthouseConfig)
    names = ("dense_first", "dense_last", "discard_output", "rope", "edge_budget")
    own = {name: getattr(args, "lighthouse_" + name) for name in names}
    base = LIGHTHOUSE.base(config)
    around = read_options(args, base.name, base.config) if base.config else None
    settings = LighthouseSettings(config, **own, schedule=stage.schedule_from(args), attention_layers=holding, around=around)
    _ = settings.edge  # checked
    return settings


def _check_budgets(args: argparse.Namespace, length: int | None) -> None:
    """Raises ValueError where budgets do not go together: before the config does, for it knows no length to offer some for."""
    given = {name: getattr(args, f"lighthouse_{name}") for name in ("levels", "pooling", "budget", "tile_budget")}
    if length is None or None in given.values() or min(given["levels"], given["pooling"]) < 2:
        return
    ranks, edge = getattr(args, "context_parallel_size", 1), args.lighthouse_edge_budget
    sizes = Sizes(**given, seq_length=0 if documents.asked(args) else length, ranks=ranks)
    if problem := budget_problem(sizes, lambda tried: edge is None or tried._replace(budget=edge).fit):
        raise ValueError(in_flags(problem))
    if edge is not None and (
        problem := budget_problem(
            sizes._replace(budget=edge), lambda tried: tried._replace(budget=sizes.budget).fit or not sizes.fit
        )
    ):
        raise ValueError(of_edge(problem))
