"""CUDA graphs: where a run takes them by itself, and what Megatron's kinds do not go with. Imports no Megatron.

Megatron's `local` captures each layer, forward and backward; `full_iteration` all of an iteration but the optimizer's step.
What is captured is repeated as it was: nothing within may wait for the host, or change from one iteration to the next.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

from megatron_lighthouse.context_parallel.schemes import SWITCH
from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line import evaluations, graph_modules, pyramid
from megatron_lighthouse.mcore.command_line.layers import hybrid_pattern
from megatron_lighthouse.mcore.command_line.stage import Schedule
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.variants import VARIANTS

FLAG = "--graphs"
AUTO, OFF = "auto", "off"
BY_DEFAULT = OFF
"""Of `--graphs`."""
KINDS = ("local", "transformer_engine", "full_iteration")
"""Of Megatron's --cuda-graph-impl, but for none."""
BEST = "full_iteration"
"""Of Megatron's --cuda-graph-impl, what `--graphs auto` takes: 0.198 s a step of the 530M model at 32,768 tokens (one H200),
where `local` takes 0.206. Through evaluations, checkpoints and a switch of stage its losses had an eager run's bits there."""
MOST_TOKENS = 65536
"""Of a rank, at which graphs still save time: the host is the slower one at 32,768, and at 98,304 it is not (one H200)."""
SAVE = "at 32,768 tokens they took a fifth off an iteration on an H200, and more where the host was slower"
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")
OFFLOADS = ("cpu_offloading", "cpu_offloading_num_layers", "fine_grained_activation_offloading")
UNTRIED = (
    *OFFLOADS,
    "num_experts",
    "fp8",
    "fp4",
    "mtp_num_layers",
    "multi_latent_attention",
    "recompute_granularity",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
)
"""Options with which graphs have not been tried: `--graphs auto` leaves them off."""
OLDER = {"enable_cuda_graph": "local", "external_cuda_graph": "transformer_engine"}
"""What --cuda-graph-impl was called."""
CHECK = "--no-check-for-nan-in-loss-and-grad"
UNSEEN = ("save_activations_interval", "save_dgrads_interval", "save_tokens_per_expert_interval")
"""What Megatron sees by hooks on modules, of which a graph that is repeated calls none."""
TIMED = ("timing_log_level", "log_straggler")
"""For what Megatron waits, or records events, within an iteration."""
DROPOUT = ("hidden_dropout", "attention_dropout")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--graphs`."""
    parser.add_argument_group("graphs").add_argument(
        FLAG,
        choices=[AUTO, OFF],
        help=f"'{AUTO}' adds --cuda-graph-impl {BEST} where graphs save time, one rank trains and nothing forbids them, and "
        f"says why where they are left off. Default: {BY_DEFAULT}. --cuda-graph-impl goes before it.",
    )
    return parser


def flag_named(name: str) -> str:
    """Megatron's flag of an argument."""
    return f"--{name.replace('_', '-')}"


def kind_of(args: Any) -> str:
    """Megatron's --cuda-graph-impl, by its older names too; of arguments or a TransformerConfig."""
    older = (kind for name, kind in OLDER.items() if getattr(args, name, False))
    kind = str(next(older, getattr(args, "cuda_graph_impl", "none")))
    # beside Transformer Engine's Megatron refuses it
    whole = kind in ("none", "local") and graph_modules.ITERATION in graph_modules.names(args)
    return graph_modules.ITERATION if whole else kind


def problems(args: argparse.Namespace) -> Iterator[str]:
    """What graphs do not go with, whatever the attention."""
    kind = kind_of(args)
    yield from graph_modules.problems(args, kind)
    if kind == "none":
        return
    asked = f"--cuda-graph-impl {kind}"
    if getattr(args, "graphs", None) == OFF:
        yield f"{FLAG} {OFF} with {asked}: leave one of them out."
    if kind != "full_iteration" and args.recompute_granularity == "full":
        yield (
            f"--recompute-granularity full with {asked}: a graph of one layer cannot hold it: use --cuda-graph-impl "
            f"full_iteration {CHECK}, --recompute-granularity selective without --recompute-method and "
            "--recompute-num-layers, or leave one of them out."
        )
    for name in OFFLOADS if kind == "local" else OFFLOADS[:2]:
        if kind != "full_iteration" and getattr(args, name, None):
            use = (
                f"--cuda-graph-impl full_iteration {CHECK}" if name in OFFLOADS[:2] else "--cuda-graph-impl transformer_engine"
            )
            yield (
                f"{flag_named(name)} with {asked}: a graph never gives back memory, and offloading does: "
                f"use {use}, or leave one of them out."
            )
    for name in UNSEEN + (TIMED if kind == "full_iteration" else ()):
        if value := getattr(args, name, None):
            instead = "leave one of them out" if name in UNSEEN else "leave it out, or use --cuda-graph-impl local"
            yield f"{flag_named(name)} {value} with {asked}: within a graph it sees nothing: {instead}."
    if kind == "full_iteration" and getattr(args, "fp16", False) and not getattr(args, "loss_scale", None):
        yield (
            f"--fp16 with {asked}, which would go on with the loss scale that it captured: use --bf16, a constant "
            "--loss-scale, or --cuda-graph-impl local."
        )
    yield from _evaluated(args, kind)
    if kind == "full_iteration" and getattr(args, "check_for_large_grads", False):
        yield f"--check-for-large-grads with {asked}: within a graph nothing can be looked at: leave it out, or use local."
    schedule = getattr(args, "step_batch_size_schedule", None)
    if kind != "local" and schedule:
        yield (
            f"--step-batch-size-schedule {schedule} with {asked}, which captures as many micro-batches as the first iterations "
            "have: use --cuda-graph-impl local, or leave one of them out."
        )


def _evaluated(args: argparse.Namespace, kind: str) -> Iterator[str]:
    """What an evaluation would not be as without graphs: `local` repeats in it the graphs that train, with what these do."""
    if kind != "local" or not evaluations.of_what_trains(args):
        return
    asked, rows = f"--cuda-graph-impl {kind}", args.micro_batch_size
    evaluated = getattr(args, "eval_micro_batch_size", None) or rows
    if evaluated != rows:
        yield (
            f"--eval-micro-batch-size {evaluated} with {asked}, whose graphs are of --micro-batch-size {rows}: use "
            f"--eval-micro-batch-size {rows}, or --eval-iters 0."
        )
    if dropout := [name for name in DROPOUT if getattr(args, name, 0)]:
        given = " and ".join(f"{flag_named(name)} {getattr(args, name)}" for name in dropout)
        none = " ".join(f"{flag_named(name)} 0" for name in dropout)
        yield (
            f"{given} with {asked}, whose graphs drop out in evaluations too: use {none}, --eval-iters 0, or --cuda-graph-impl "
            f"full_iteration {CHECK}."
        )


def copies_problems(config: Any, comm_types: Sequence[str]) -> Iterator[str]:
    """What rows that ranks copy to each other do not go with: this project's own attention over shards, dense too.

    Graphs of whole passes can be repeated (`context_parallel.copies`), and Megatron's `local` and `full_iteration` capture
    whole layers, forward and backward. What Transformer Engine's helper captures has not been tried.
    """
    kind = kind_of(config)
    if kind == "transformer_engine" and copied(comm_types):
        yield (
            f"--cuda-graph-impl {kind} is not tried with --cp-comm-type p2p, which copies between GPUs: use --cuda-graph-impl "
            f"local, --cp-comm-type all_gather, or set {SWITCH}=0 in the environment."
        )


def beside_copies(args: argparse.Namespace, config: Any, comm_types: Sequence[str]) -> Iterator[str]:
    """What else may not be under way in a graph that holds such copies.

    A graph keeps the order of what depends on each other alone. A rank's wait for a message comes after all that the message
    waits for elsewhere, but not after the reductions and sends of other groups that were begun before it in the program: where
    branches share a queue, ranks of several groups could wait for each other in a circle. Within a layer there are none.
    """
    beside = [name for name in ("overlap_grad_reduce", "overlap_param_gather") if getattr(args, name, False)]
    if (getattr(args, "pipeline_model_parallel_size", 1) or 1) > 1:
        beside.append("pipeline_model_parallel_size")
    if kind_of(config) == "full_iteration" and copied(comm_types) and beside:
        yield (
            f"--cuda-graph-impl full_iteration with {flag_named(beside[0])} and --cp-comm-type p2p, which copies "
            "between GPUs, could have ranks wait for each other in a circle: use --cuda-graph-impl local, or set "
            f"{SWITCH}=0 in the environment."
        )


def copied(comm_types: Sequence[str]) -> bool:
    """Whether rows may go by copies. Which ranks can is known when they have met."""
    return "p2p" in comm_types and os.environ.get(SWITCH) != "0"


def switch_problems(config: Any, schedule: Schedule) -> Iterator[str]:
    """Which kinds cannot capture anew where layers change: see `loop.captured`."""
    kind = kind_of(config)
    if kind == "transformer_engine":
        for name, at in schedule.changes.items():
            yield (
                f"--cuda-graph-impl {kind} captures once, so that {name} {at} would change nothing: use --cuda-graph-impl "
                f"local, or leave one of them out (--exit-interval {at} and a second job give the same run, with --attention "
                f"dense in the {'second' if at == schedule.stage2_at else 'first'} of them)."
            )
    elif kind != "none" and schedule.return_iters > 1:
        yield (
            f"--cuda-graph-impl {kind} would be captured anew for each of the layers that become dense over "
            f"{flag('return_iters')} {schedule.return_iters}: use {flag('return')} hard, or leave it out."
        )


def taken(args: argparse.Namespace, gpu: bool) -> list[str]:
    """What the run adds to its command line; says why graphs are left off, or what they would save.

    Args:
        args: as the words say, not validated.
        gpu: whether there is one; graphs that are asked for where there is none are refused before.
    """
    kind = kind_of(args)
    if kind != "none":
        return _prepared(args, kind)
    if not gpu or args.skip_train:
        return []
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if line := remark(args, ranks):
        say_once(line)
        best = choice(args, ranks)[0]
        return ["--cuda-graph-impl", best, *_prepared(args, best)] if best else []
    if args.graphs is None and choice(args, ranks)[0]:
        say_once(f"CUDA graphs are off: {SAVE}. {FLAG} {AUTO} turns them on.")
    return []


def remark(args: argparse.Namespace, ranks: int) -> str | None:
    """What `--graphs auto` makes of a run on so many ranks with GPUs; None where it is not asked, or not of training."""
    if (args.graphs or BY_DEFAULT) != AUTO or kind_of(args) != "none" or args.skip_train:
        return None
    best, because = choice(args, ranks)
    return f"{FLAG} {AUTO}: " + (f"--cuda-graph-impl {best} is taken." if best else f"CUDA graphs are left off: {because}")


def _prepared(args: argparse.Namespace, kind: str) -> list[str]:
    """Prepares NCCL for graphs. Answers what turns Megatron's check off, where it must be: `loop.finite` has another."""
    # Megatron 0.19 asks its users for it, against illegal memory accesses beside expandable segments
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    return [CHECK] if kind == "full_iteration" and args.check_for_nan_in_loss_and_grad else []


def choice(args: argparse.Namespace, ranks: int = 1) -> tuple[str | None, str | None]:
    """What `--graphs auto` takes on so many ranks; or why it leaves them off."""
    because = _left_off(args) or _forbidden(args, BEST)
    if because is None and ranks > 1:
        because = f"they are not tried with evaluations over {ranks} ranks. --cuda-graph-impl local is for several."
    return (None, because) if because else (BEST, None)


def _left_off(args: argparse.Namespace) -> str | None:
    """Why they would save nothing, or have not been tried; None where they have."""
    if args.use_checkpoint_args or args.spec is not None:
        return f"what --{'use-checkpoint-args' if args.use_checkpoint_args else 'spec'} brings is not known before."
    variant, ranks = VARIANTS[args.attention], args.context_parallel_size
    if not variant.selects or getattr(args, "lighthouse_around", "softmax") != "softmax":
        tried = "Lighthouse around softmax attention" if variant.selects else "--attention lighthouse"
        return f"they are tried with {tried} alone."
    tokens = (args.seq_length or args.encoder_seq_length or 0) * (args.micro_batch_size or 1) // ranks
    if not tokens or tokens > MOST_TOKENS:
        return (
            f"at {tokens:,} tokens a rank the host keeps up, and they would take memory for nothing (beyond {MOST_TOKENS:,})."
        )
    named = {name: value for name in SIZES if (value := getattr(args, name, 1) or 1) > 1}
    named |= {name: value for name in UNTRIED if (value := getattr(args, name, None))}
    if hybrid_pattern(args):
        named["hybrid_layer_pattern"] = args.hybrid_layer_pattern
    for name, value in named.items():
        return f"they are not tried with {flag_named(name)} {value}."
    return None


def _forbidden(args: argparse.Namespace, kind: str) -> str | None:
    """The first rule that refuses this kind and not the run without it."""
    without = copy(args)
    without.rank = 0
    without.num_layers = args.num_layers or args.encoder_num_layers
    without.seq_length = args.seq_length or args.encoder_seq_length
    if not (without.num_layers and without.num_attention_heads):
        return "the model is not known."
    vars(without).update(pyramid.sizes(without, without.seq_length))
    graphed = copy(without)
    graphed.cuda_graph_impl, graphed.graphs = kind, AUTO
    known = {*_rules(without)}
    return next((rule for rule in _rules(graphed) if rule not in known), None)


def _rules(args: argparse.Namespace) -> Iterator[str]:
    from megatron_lighthouse.mcore.command_line import tiles
    from megatron_lighthouse.mcore.command_line.arguments import attention_problems, config_of

    yield from problems(args)
    yield from tiles.problems(args)
    yield from attention_problems(args, config_of(args), by_spec=False, has_spec=False)
