"""Which of Megatron's options ask for others, or exclude them: its own assertions, said before, with what works.

Of them those that a line of a recipe and one of a user's bring together. Imports no Megatron.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

from megatron_lighthouse.mcore.command_line import graphs
from megatron_lighthouse.options import as_words
from megatron_lighthouse.usage import as_flag

ENGINE = "--transformer-impl transformer_engine"
ACTIVATIONS = ("--swiglu", "--squared-relu", "--quick-geglu")
"""Of the MLP: Megatron's default is GELU."""
MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts", "gdn_norm_out")
"""Of --recompute-modules."""
OF_FULL = ("recompute_method", "recompute_num_layers")
"""Read with --recompute-granularity full."""
FULL = "--recompute-method uniform --recompute-num-layers 1"
"""What --recompute-granularity full is given most often."""


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Options that do not go together, whatever the model.

    Args:
        args: as the words say, not validated.
    """
    yield from _sharded_weights(args)
    yield from _optimizer(args)
    yield from _recompute(args)
    yield from _interleaved(args)
    if args.tp_comm_overlap and not (args.sequence_parallel and args.tensor_model_parallel_size > 1):
        yield (
            "--tp-comm-overlap needs --sequence-parallel and a --tensor-model-parallel-size above 1: add them, or leave it out."
        )
    for flag, value in (("--fp8-format", args.fp8), ("--fp4-format", args.fp4)):
        if value and args.transformer_impl == "local":
            yield f"{as_words(flag, value)} is read by Transformer Engine's layers alone: leave it out, or use {ENGINE}."
    if args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == "te":
        yield "--cross-entropy-fusion-impl te is turned off in Megatron 0.19, for it was not stable: use native."
    if graphs.kind_of(args) == "full_iteration" and args.check_for_nan_in_loss_and_grad:
        yield "--cuda-graph-impl full_iteration needs --no-check-for-nan-in-loss-and-grad: add it, or use local."
    sizes, ranks = args.hierarchical_context_parallel_sizes, args.context_parallel_size
    if ranks > 1 and "a2a+p2p" in args.cp_comm_type and sizes and math.prod(sizes) != ranks:
        yield (
            f"--hierarchical-context-parallel-sizes {' '.join(map(str, sizes))} make {math.prod(sizes)} ranks, and "
            f"--context-parallel-size is {ranks}: give two sizes whose product is {ranks}."
        )


def model_problems(args: argparse.Namespace) -> Iterator[str]:
    """Options of a model that do not go together, where the words say it and not a checkpoint."""
    if len(shapes := [flag for flag in ACTIVATIONS if getattr(args, flag[2:].replace("-", "_"))]) > 1:
        yield f"{' and '.join(shapes)} exclude each other: leave all but one out."
    if args.qk_layernorm and args.qk_l2_norm:
        yield "--qk-layernorm and --qk-l2-norm exclude each other: leave one of them out."
    if args.num_experts and (size := args.tensor_model_parallel_size) > 1 and not args.sequence_parallel:
        yield f"--num-experts {args.num_experts} with --tensor-model-parallel-size {size} needs --sequence-parallel: add it."
    if not args.num_experts and args.expert_model_parallel_size > 1:
        yield (
            f"--expert-model-parallel-size {args.expert_model_parallel_size} is of experts, and there are none: leave it out, "
            "or add --num-experts."
        )


def _sharded_weights(args: argparse.Namespace) -> Iterator[str]:
    if args.use_megatron_fsdp and args.ckpt_format != "fsdp_dtensor":
        yield f"--use-megatron-fsdp with --ckpt-format {args.ckpt_format}: use --ckpt-format fsdp_dtensor."
    if args.ckpt_format == "fsdp_dtensor" and not args.use_megatron_fsdp:
        yield "--ckpt-format fsdp_dtensor is of --use-megatron-fsdp: use torch_dist, or add that."
    if args.ckpt_format == "torch_dcp" and not args.use_torch_fsdp2:
        yield "--ckpt-format torch_dcp is of --use-torch-fsdp2: use torch_dist, or add that."
    if args.use_megatron_fsdp and args.optimizer not in ("sgd", "adam"):
        yield f"--use-megatron-fsdp does not go with --optimizer {args.optimizer}: use adam, or leave it out."
    if args.use_torch_fsdp2 and args.use_distributed_optimizer:
        yield "--use-torch-fsdp2 and --use-distributed-optimizer exclude each other: leave one of them out."
    if args.use_torch_fsdp2 and args.pipeline_model_parallel_size > 1:
        size = args.pipeline_model_parallel_size
        yield f"--use-torch-fsdp2 does not go with --pipeline-model-parallel-size {size}: use size 1, or leave it out."


def _optimizer(args: argparse.Namespace) -> Iterator[str]:
    sharded = args.use_distributed_optimizer or args.use_megatron_fsdp or args.optimizer == "dist_muon"
    if args.overlap_param_gather and not sharded:
        yield "--overlap-param-gather needs --use-distributed-optimizer: add it, or leave that out."
    if args.overlap_param_gather and not args.overlap_grad_reduce:
        yield "--overlap-param-gather needs --overlap-grad-reduce: add it, or leave that out."
    asked = [name for name in ("optimizer_cpu_offload", "use_precision_aware_optimizer") if getattr(args, name)]
    wants = ["use_precision_aware_optimizer", *([] if args.use_megatron_fsdp else ["use_distributed_optimizer"])]
    if asked and (missing := [as_flag(name) for name in wants if not getattr(args, name)]):
        them = "it" if len(missing) == 1 else "them"
        yield f"{as_flag(asked[0])} needs {' and '.join(missing)}: add {them}, or leave that out."


def _recompute(args: argparse.Namespace) -> Iterator[str]:
    full = args.recompute_granularity == "full" and not args.recompute_activations
    if full and not (args.recompute_method and args.recompute_num_layers):
        yield f"--recompute-granularity full needs a method and a number of layers: add {FULL}."
        return
    selects = args.recompute_granularity == "selective" or args.recompute_activations
    of_full = [as_words(as_flag(name), value) for name in OF_FULL if (value := getattr(args, name))]
    if of_full and selects:
        are, them = ("is", "it") if len(of_full) == 1 else ("are", "them")
        yield f"{' '.join(of_full)} {are} of --recompute-granularity full: leave {them} out, or use that."
    if selects and (unknown := [name for name in args.recompute_modules or () if name not in MODULES]):
        yield f"--recompute-modules {' '.join(unknown)} is not known: use some of {', '.join(MODULES)}."


def _interleaved(args: argparse.Namespace) -> Iterator[str]:
    """Pipeline stages of several parts each."""
    layers, stages = args.num_layers or args.encoder_num_layers, args.pipeline_model_parallel_size
    each, parts = args.num_layers_per_virtual_pipeline_stage, args.num_virtual_stages_per_pipeline_rank
    if each is None and parts is None:
        return
    if (parts or (layers or 0) // max(1, each or 1)) == 1:  # Megatron takes that for none
        return
    flag = "--num-virtual-stages-per-pipeline-rank" if each is None else "--num-layers-per-virtual-pipeline-stage"
    if stages == 1:
        yield f"{flag} {each or parts} parts pipeline stages, and there is one: leave it out, or use more stages."
        return
    ends = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    own = (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers, args.pipeline_model_parallel_layout)
    if layers and own == (None, None, None) and (of_stage := (layers + ends) // stages) % (size := each or parts):
        fits = " or ".join(str(n) for n in range(2, of_stage) if of_stage % n == 0)
        use = f"use {fits}" if fits else "leave it out"
        yield f"{flag} {size} must divide the {of_stage} layers of a pipeline stage: {use}."
