"""What `check` asks of a run's ranks: whether GPUs, heads, layers and batches are shared out evenly. Imports no Megatron."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

from megatron_lighthouse.launch import offered
from megatron_lighthouse.launch.offered import one_sequence
from megatron_lighthouse.mcore.command_line.layers import written_pattern
from megatron_lighthouse.nearest import around, either, multiples
from megatron_lighthouse.shared_out import gpus_shared, groups_problem, shared_out_problem
from megatron_lighthouse.usage import as_flag
from megatron_lighthouse.variants import VARIANTS

OWN = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
"""Layers of the first and of the last stage, where these have other numbers than the rest."""
ENDS = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
"""Each counts as a layer where the pipeline is split."""


def enough(args: argparse.Namespace, gpus: int) -> Iterator[str]:
    """Whether one sequence fits on these GPUs."""
    if (one := one_sequence(args)) > gpus:
        yield (
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} x --context-parallel-size "
            f"{args.context_parallel_size} x --pipeline-model-parallel-size {args.pipeline_model_parallel_size} = {one} GPUs, "
            f"and there are {gpus}: use smaller sizes (CP of --study), or --gpus {one}."
        )


def layout(args: argparse.Namespace, nodes: int, gpus_per_node: int, asked_by: str = "--nodes") -> Iterator[str]:
    """The arithmetic of tensor, context, pipeline and data parallel ranks.

    Args:
        asked_by: the flag that says how many GPUs: a job's --nodes, or of one machine --gpus, or torchrun's --nproc-per-node.
    """
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    pipeline, world = args.pipeline_model_parallel_size, nodes * gpus_per_node
    one = one_sequence(args)
    flags = (("tensor-model", tensor), ("context", context), ("pipeline-model", pipeline))
    product = " x ".join(f"--{name}-parallel-size {size}" for name, size in flags)
    batch, micro = args.global_batch_size, args.micro_batch_size or 1
    if world % one:
        gpus = f"the GPUs of the job, {nodes} node{'s' * (nodes != 1)} x {gpus_per_node} = {world}"
        offers = [*offered.in_words(offered.sizes(args, world)), *offered.gpus(args, nodes, gpus_per_node, asked_by)]
        offers = offers or offered.in_words(offered.sizes(args, world, alone=True))  # where something else is wrong
        yield (
            f"{product} = {one} must divide {gpus if asked_by == '--nodes' else f'{asked_by} {world}'}: use "
            f"{', or '.join(offers) or 'smaller sizes'}."
        )
    elif batch and batch % (unit := micro * (world // one)) and not args.decrease_batch_size_if_needed:
        yield (
            f"--global-batch-size {batch} must be a multiple of {unit} (--micro-batch-size {micro} x {world // one} "
            f"data-parallel ranks): use --global-batch-size {either(multiples(batch, unit))}."
        )
    elif batch:
        yield from interleaved(args, batch // unit, unit)
    if world % one == 0:
        yield from evaluated(args, (batch or micro * (world // one)), world // one)
    yield from experts(args, world)
    if world % one == 0 and (world // tensor // pipeline) % (instances := args.num_distributed_optimizer_instances):
        yield (
            f"--num-distributed-optimizer-instances {instances} must divide the {world // tensor // pipeline} data- and "
            f"context-parallel ranks: use {either(around(instances, lambda n: world // tensor // pipeline % n == 0, world))}."
        )
    # torchrun's Megatron only profiles none of them
    if (
        asked_by != "--nproc-per-node"
        and args.profile
        and (beyond := [rank for rank in args.profile_ranks or () if rank >= world])
    ):
        yield f"--profile-ranks {' '.join(map(str, beyond))} is beyond the last of {world} ranks: use 0 to {world - 1}."
    yield from stages(args)
    heads, groups = args.num_attention_heads, args.num_query_groups or args.num_attention_heads
    # Megatron gives several ranks the same group
    copied = VARIANTS[args.attention].copies_groups and groups and tensor % groups == 0
    unknown = copied or args.use_checkpoint_args  # then it is the checkpoint's, whatever is said here
    if heads:
        # of tensor-parallel sizes that the heads take, those that the key/value heads and the GPUs take too
        common = math.gcd(heads if unknown else math.gcd(heads, groups), gpus_shared(args))
        if problem := shared_out_problem("--num-attention-heads", heads, tensor, common):
            yield problem
        if args.num_query_groups and not unknown and (problem := groups_problem(args)):
            yield problem
    groups = max(1, (groups or context * tensor) // tensor)
    if "a2a" in args.cp_comm_type and groups % context:
        engine = args.transformer_impl == "transformer_engine" and (args.window_size or args.softmax_type != "vanilla")
        offers = [] if engine else ["--cp-comm-type p2p"]  # which has no windows and no sinks there
        alone = one // context

        def fits(size: int) -> bool:
            ranks, rest = divmod(world, alone * size)
            return groups % size == 0 and rest == 0 and (not batch or batch % (micro * ranks) == 0)

        offers += [f"--context-parallel-size {either(near)}" for near in [around(context, fits, groups)] if near]
        yield (
            f"--cp-comm-type a2a shares out a tensor-parallel rank's {groups} key/value heads, and --context-parallel-size "
            f"{context} does not divide them: use {', or '.join(offers) or f'a divisor of {groups}'}."
        )


def evaluated(args: argparse.Namespace, batch: int, ranks: int) -> Iterator[str]:
    """Whether data-parallel ranks share out the sequences of an evaluation's step, which are `batch` where not given."""
    size, micro = args.eval_global_batch_size or batch, args.eval_micro_batch_size or args.micro_batch_size or 1
    if (args.eval_global_batch_size or args.eval_micro_batch_size) and size % (unit := micro * ranks):
        yield (
            f"--eval-global-batch-size {size} (where not given, --global-batch-size) must be a multiple of {unit} "
            f"(--eval-micro-batch-size {micro} x {ranks} data-parallel ranks): use --eval-global-batch-size "
            f"{either(multiples(size, unit))}."
        )


def interleaved(args: argparse.Namespace, micro_batches: int, unit: int) -> Iterator[str]:
    """Whether as many micro batches of a step go through a pipeline whose stages have several parts.

    Args:
        unit: sequences of one, on all data-parallel ranks.
    """
    if args.num_layers_per_virtual_pipeline_stage is None and args.num_virtual_stages_per_pipeline_rank is None:
        return
    pipeline = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or pipeline
    if 0 < micro_batches % group < pipeline:
        use = either(n * unit for n in multiples(micro_batches, group))
        yield (
            f"--global-batch-size {micro_batches * unit} makes {micro_batches} micro batches, of which stages of several parts "
            f"take groups of {group}: use --global-batch-size {use}."
        )


def experts(args: argparse.Namespace, world: int) -> Iterator[str]:
    """Whether the ranks of experts share out the GPUs: by default they are tensor-parallel as the rest of the model is."""
    expert, tensor = args.expert_model_parallel_size, args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    pipeline = args.pipeline_model_parallel_size
    if not args.num_experts or world % (expert * tensor * pipeline) == 0:
        return
    alone = tensor > 1 and world % (expert * pipeline) == 0
    one = tensor * pipeline
    fits = around(expert, lambda n: args.num_experts % n == 0 and world % (n * one) == 0, args.num_experts)
    offers = ["--expert-tensor-parallel-size 1"] if alone else []
    offers += [f"--expert-model-parallel-size {either(fits)}"] if fits else []
    yield (
        f"--expert-model-parallel-size {expert} x --expert-tensor-parallel-size {tensor} (where not given, "
        f"--tensor-model-parallel-size) x --pipeline-model-parallel-size {pipeline} = {expert * tensor * pipeline} must divide "
        f"the {world} GPUs: use {', or '.join(offers) or 'smaller sizes'}."
    )


def stages(args: argparse.Namespace) -> Iterator[str]:
    """Whether the layers make pipeline stages of one size; where the command line gives all sizes, Megatron checks them."""
    if not args.num_layers or args.pipeline_model_parallel_layout is not None:
        return
    flag, pattern = written_pattern(args)
    if any(getattr(args, name) is not None for name in OWN):
        layers = f"--num-layers {args.num_layers}" if pattern is None else f"the {args.num_layers} layers of {flag}"
        yield from uneven_stages(args, layers) if "|" not in (pattern or "") else ()
        return
    if pattern is not None:  # which says so itself
        return
    layers, pipeline = args.num_layers, args.pipeline_model_parallel_size
    ends = [flag for flag in ENDS if getattr(args, flag[2:].replace("-", "_"))]
    if (layers + len(ends)) % pipeline:
        less = (layers + len(ends)) // pipeline * pipeline - len(ends)
        use = " or ".join(str(n) for n in (less, less + pipeline) if n > 0)
        yield (
            f"{' + '.join([f'--num-layers {layers}', *(f'1 ({flag})' for flag in ends)])} must be a multiple of "
            f"--pipeline-model-parallel-size {pipeline}: use --num-layers {use}."
        )


def uneven_stages(args: argparse.Namespace, of_model: str) -> Iterator[str]:
    """Whether the stages between the first and the last share out the layers that these leave.

    Args:
        of_model: the model's layers, in words.
    """
    given = [name for name in OWN if getattr(args, name) is not None]
    layers, stages, own = args.num_layers, args.pipeline_model_parallel_size, sum(getattr(args, name) for name in given)
    others = stages - len(given)

    def works(own: int) -> bool:
        left = layers - own
        return left == 0 if others == 0 else left > 0 and left % others == 0

    if stages > 1 and works(own):
        return
    name, rest = given[0], own - getattr(args, given[0])
    near = around(getattr(args, name), lambda n: works(n + rest), layers) if stages > 1 else []
    use = f"use {as_flag(name)} {either(near)}" if near else "use more stages, or leave it out"
    said = " and ".join(f"{as_flag(one)} {getattr(args, one)}" for one in given)
    yield (
        f"{said}: {layers - own} of {of_model} are left to the {others} other stages of "
        f"--pipeline-model-parallel-size {stages}, which must have equally many: {use}."
    )
