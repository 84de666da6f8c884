"""What selection does, in Megatron's logs: the measures of `telemetry` for some layers, every so many iterations.

The ranks that share a sequence put its layers' choices together and measure these; one sum over all ranks brings the numbers to
the last rank, which has Megatron's writers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line import graphs
from megatron_lighthouse.mcore.command_line.layers import in_words
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, settings_from
from megatron_lighthouse.mcore.loop import switch
from megatron_lighthouse.notice import say_once

if TYPE_CHECKING:
    from megatron_lighthouse.lighthouse import telemetry

INTERVAL, LAYERS = flag("telemetry_interval"), flag("telemetry_layers")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--lighthouse-telemetry-*`."""
    group = parser.add_argument_group("telemetry", "what selection does, in TensorBoard and W&B")
    group.add_argument(
        INTERVAL,
        type=int,
        default=0,
        metavar="ITERS",
        help="Log coverage, entries, distances and dependence on later tokens in every such iteration. Default: 0, never.",
    )
    group.add_argument(
        LAYERS,
        type=int,
        nargs="+",
        metavar="LAYER",
        help="The Lighthouse layers to log and to draw, by their numbers in the model, from 1. Default: the first, the middle "
        "and the last.",
    )
    return parser


def watched_layers(args: argparse.Namespace) -> tuple[int, ...]:
    """The layers to log and to draw, without repeats; none where the model has no Lighthouse layers."""
    if args.lighthouse_telemetry_layers is not None:
        return tuple(dict.fromkeys(args.lighthouse_telemetry_layers))
    numbers = settings_from(args).numbers(args.num_layers)
    return tuple(sorted({numbers[0], numbers[(len(numbers) - 1) // 2], numbers[-1]})) if numbers else ()


def problems(args: argparse.Namespace, settings: LighthouseSettings) -> Iterator[str]:
    """What of the telemetry cannot be as asked."""
    interval, named = args.lighthouse_telemetry_interval, args.lighthouse_telemetry_layers
    if interval < 0:
        yield f"{INTERVAL} {interval} must not be negative: use 0 to log nothing, or a number of iterations, such as 100."
    numbers = settings.numbers(args.num_layers)
    if wrong := [layer for layer in named or () if layer not in numbers]:
        yield f"{LAYERS} {' '.join(map(str, wrong))}: the Lighthouse layers are {in_words(numbers)}, use some of these."
    if named and not interval and not getattr(args, "lighthouse_selection_map", None):
        yield f"{LAYERS} {' '.join(map(str, named))} says what to log, and nothing says when: add {INTERVAL} ITERS."
    if interval <= 0:
        return
    if not args.tensorboard_dir and not getattr(args, "wandb_project", None):
        yield f"{INTERVAL} {interval} has nowhere to log to: add --tensorboard-dir DIR or --wandb-project NAME."
    if (kind := graphs.kind_of(args)) != "none":
        yield f"{INTERVAL} {interval} cannot look into the graphs of --cuda-graph-impl {kind}: leave one of them out."


def check(args: argparse.Namespace, settings: LighthouseSettings) -> None:
    """Raises ValueError: what cannot be as asked, one a line, with what would work."""
    if found := [*problems(args, settings)]:
        raise ValueError("\n".join(found))


@dataclass(frozen=True)
class Logged:
    """What is logged, when, and of which layers."""

    settings: LighthouseSettings
    interval: int
    layers: tuple[int, ...]
    num_layers: int

    def train_step(self, step: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Around Megatron's."""
        from megatron_lighthouse.lighthouse import telemetry

        now = switch.iteration()
        selecting = [layer for layer in self.layers if not self.settings.is_dense(layer, self.num_layers, now)]
        if now % self.interval or not selecting:
            return step(*given, **named)
        with telemetry.watching(selecting):
            answer = step(*given, **named)
            log(selecting, self.settings.config.levels, now)
        return answer


def logged(args: argparse.Namespace, settings: LighthouseSettings) -> Logged | None:
    """What `args` ask for; None where nothing is logged."""
    interval = args.lighthouse_telemetry_interval
    return Logged(settings, interval, watched_layers(args), args.num_layers) if interval else None


def say_nothing_is_logged(args: argparse.Namespace) -> None:
    """For a dense run with the arguments of a Lighthouse run. Not an error: the second of two jobs is one."""
    if args.lighthouse_telemetry_interval and not args.rank:
        say_once(f"lighthouse: {INTERVAL} {args.lighthouse_telemetry_interval} logs nothing, for no layer selects.")


def log(layers: Sequence[int], levels: int, iteration: int) -> None:
    """Log the `averages` of an iteration's last micro-batch, where this rank has a writer. Every rank calls it."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    scalars = averages(layers, levels)
    if writer := get_tensorboard_writer():
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(scalars, iteration)


def averages(layers: Sequence[int], levels: int) -> dict[str, float]:
    """The measures of `layers`, averaged over the data-parallel ranks. Every rank calls it.

    Returns:
        By 'lighthouse/what/layer-N/which', the same on every rank.
    """
    import torch

    from megatron_lighthouse.lighthouse import telemetry

    names = telemetry.measure_names(levels)
    here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    sums = torch.zeros(len(layers), len(names) + 1, dtype=torch.float64)
    for row, layer in zip(sums, layers, strict=True):
        if choice := telemetry.watched().get(layer):  # in this pipeline stage
            measured = telemetry.measures(whole(choice))
            row.copy_(torch.tensor([*measured.values(), 1.0], dtype=row.dtype))
    sums = sums.to(here)
    torch.distributed.all_reduce(sums)
    scalars = {}
    for layer, (*values, ranks) in zip(layers, sums.tolist(), strict=True):
        for name, value in zip(names, values, strict=True):
            what, which = name.split("/")
            if ranks and not math.isnan(value):  # what cannot be told of this scorer
                scalars[f"lighthouse/{what}/layer-{layer}/{which}"] = value / ranks
    return scalars


def whole(choice: telemetry.Choice) -> telemetry.Choice:
    """The choice of all tokens and heads. All ranks that share a sequence in a pipeline stage call it."""
    from megatron.core import mpu

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.lighthouse import telemetry

    shards, heads = mpu.get_context_parallel_group(), mpu.get_tensor_model_parallel_group()
    return telemetry.whole(choice, Exchange.over(shards), Exchange.over(heads))
