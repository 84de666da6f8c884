"""What Megatron-core 0.19 refuses without a word, or late: said before, with what works. Imports no Megatron.

Its own rules are bare assertions in `validate_args` and `OptimizerParamScheduler`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.mcore.command_line import evenly, flags, hybrid, numbers, precision, schedule, together
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments
from megatron_lighthouse.mcore.command_line.layers import hybrid_pattern, is_latent, local_window_problem
from megatron_lighthouse.nearest import around, either, multiples, offers
from megatron_lighthouse.usage import GONE, as_flag
from megatron_lighthouse.variants import VARIANTS

SCHEMES = (*COMM_TYPES, "a2a+p2p")
"""Of --cp-comm-type, for which Megatron takes any word."""
ROTATED = ("rope", "yarn", "mrope")
"""Of --position-embedding-type: what turns pairs of a head's channels."""


def given(words: Sequence[str]) -> argparse.Namespace | None:
    """The arguments of a command line as it says them; None where it asks for help."""
    return None if {"-h", "--help"} & {*words} else flags.parse(words, with_all_arguments, strict=False)[0]


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Why Megatron would not train.

    Args:
        args: as the words say, not validated; numbers that mean nothing are Megatron's defaults afterwards.
    """
    yield from numbers.settle(args)
    yield from flags.apart(_rules(args), args.malformed)


def _rules(args: argparse.Namespace) -> Iterator[str]:
    if not args.use_checkpoint_args:  # else they may be the checkpoint's
        yield from hybrid.word_problems(args)
        yield from _model(args)
        yield from together.model_problems(args)
        yield from evenly.problems(args)
    yield from together.problems(args)
    yield from precision.problems(args)
    yield from _batch(args)
    yield from _saves(args)
    yield from _wandb(args)
    if not args.skip_train:
        yield from schedule.problems(args)
    for one, other in (("fp16", "bf16"), ("data_path", "data_args_path")):
        if getattr(args, one) and getattr(args, other):
            yield f"{as_flag(one)} and {as_flag(other)} exclude each other: leave one of them out."


def _model(args: argparse.Namespace) -> Iterator[str]:
    needed = ["hidden_size", "num_attention_heads", "max_position_embeddings"]
    layers = args.num_layers or args.encoder_num_layers or hybrid_pattern(args)
    needed += [] if layers or args.heterogeneous_layers_config_path else ["num_layers"]
    needed += [] if args.seq_length or args.encoder_seq_length else ["seq_length"]
    for name in needed:
        if not getattr(args, name):
            yield f"{as_flag(name)} is missing: give a whole number of at least 1."
    hidden, heads = args.hidden_size, args.num_attention_heads
    if hidden and heads and args.kv_channels is None and hidden % heads:
        yield (
            f"--hidden-size {hidden} must be a multiple of --num-attention-heads {heads} where --kv-channels is not given: use "
            f"{either(multiples(hidden, heads * (2 if _rotates(args) else 1)))}, or give --kv-channels."
        )
    if (dim := _rotated_channels(args)) is not None and (dim < 2 or (dim % 2 and args.rotary_percent == 1)):
        channels = args.kv_channels or hidden // heads
        use = f"--kv-channels {channels + channels % 2}" if channels % 2 else "--rotary-percent 1"
        yield (
            f"--kv-channels {channels} (where not given, --hidden-size / --num-attention-heads) with --rotary-percent "
            f"{args.rotary_percent:g} are {dim} channels, and RoPE turns pairs: use "
            f"{use}{' and --rotary-percent 1' if channels % 2 and dim < 2 else ''}."
        )
    length, positions = args.seq_length or args.encoder_seq_length, args.max_position_embeddings
    if length and positions and positions < length:
        flag = "--max-position-embeddings"
        yield f"{flag} {positions} must be at least --seq-length {length}: use {flag} {length}."
    layers, kinds = args.num_layers or args.encoder_num_layers, args.cp_comm_type
    if len(kinds) > 1 and layers and len(kinds) != layers:
        yield (
            f"--cp-comm-type {' '.join(kinds)} names {len(kinds)}, and --num-layers is {layers}: give one for all, such as "
            "p2p, or one a layer."
        )
    yield from _unrotated(args, layers or len(hybrid_pattern(args) or ""))
    yield from _groups(args)
    if args.transformer_impl == "local" and (problem := local_window_problem(args.window_size)):
        yield problem
    yield from _experts(args, layers)
    latent = is_latent(args)
    if latent and args.group_query_attention:
        yield (
            "--group-query-attention does not go with multi-latent attention, which makes keys and values for each head: leave "
            "it out."
        )
    if latent and (turned := args.qk_pos_emb_head_dim) % 2:
        yield f"--qk-pos-emb-head-dim {turned} must be even, for RoPE turns pairs: use {turned + 1}."
    if args.context_parallel_size > 1 and (unknown := [kind for kind in args.cp_comm_type if kind not in SCHEMES]):
        yield f"--cp-comm-type {' '.join(unknown)} is not known: use {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}."
    sizes = args.hierarchical_context_parallel_sizes
    if "a2a+p2p" in args.cp_comm_type and not sizes and args.transformer_impl != "local":  # whose layers have it not
        yield "--cp-comm-type a2a+p2p needs --hierarchical-context-parallel-sizes: add it, or use --cp-comm-type p2p."


def _unrotated(args: argparse.Namespace, layers: int) -> Iterator[str]:
    """Which layers go without RoPE, by a period or by a list."""
    every = None if is_latent(args) else args.no_rope_freq  # which latent attention does not read: said there
    if isinstance(every, list) and layers and len(every) != layers:
        yield (
            f"--no-rope-freq {every} is of {len(every)} layers, and the model has {layers}: give one number a layer, 1 where "
            "nothing is rotated, or one number N, by which each N-th goes without."
        )
    elif isinstance(every, int) and layers and layers % every:
        use = either(around(every, lambda n: layers % n == 0, layers))
        yield (
            f"--no-rope-freq {every} must divide the {layers} layers: use {use}, or a list of one number a layer, 1 for none "
            "rotated."
        )


def _groups(args: argparse.Namespace) -> Iterator[str]:
    """Whether query heads share key/value heads evenly; offers numbers that tensor-parallel ranks share out too."""
    heads, groups = args.num_attention_heads, args.num_query_groups if args.group_query_attention else None
    if not heads or not groups or heads % groups == 0:
        return
    ranks, hidden = args.tensor_model_parallel_size, args.hidden_size if args.kv_channels is None else None
    copied = VARIANTS[args.attention].copies_groups  # Megatron gives several ranks the same group

    def shared(n: int) -> bool:
        return n % ranks == 0 or (copied and ranks % n == 0)

    near = {
        "--num-query-groups": around(groups, lambda n: heads % n == 0 and shared(n), heads),
        "--num-attention-heads": multiples(
            heads, groups, lambda n: n % ranks == 0 and (hidden or n) % n == 0 and shared(groups)
        ),
    }
    yield f"--num-attention-heads {heads} must be a multiple of --num-query-groups {groups}: use {offers(near)}."


def _experts(args: argparse.Namespace, layers: int | None) -> Iterator[str]:
    experts, ranks, pattern = args.num_experts, args.expert_model_parallel_size, args.moe_layer_freq
    if not experts:
        return
    if args.moe_router_topk > experts:
        yield f"--moe-router-topk {args.moe_router_topk} must be at most --num-experts {experts}: use {min(2, experts)}, or so."
    if experts % ranks:
        world, one = getattr(args, "world_size", None), args.expert_tensor_parallel_size or args.tensor_model_parallel_size
        one *= args.pipeline_model_parallel_size
        fits = around(ranks, lambda n: experts % n == 0 and (world or n * one) % (n * one) == 0, experts)
        near = {"--expert-model-parallel-size": fits, "--num-experts": multiples(experts, ranks)}
        yield f"--num-experts {experts} must be a multiple of --expert-model-parallel-size {ranks}: use {offers(near)}."
    if isinstance(pattern, list) and layers and len(pattern) != layers:
        yield (
            f"--moe-layer-freq names {len(pattern)} layers, and --num-layers is {layers}: give one number a layer, such as "
            f"([0]+[1]*{layers - 1})."
        )
    grouped = args.moe_grouped_gemm and args.transformer_impl == "transformer_engine"
    if grouped and args.add_bias_linear and args.bias_dropout_fusion:
        yield (
            "--moe-grouped-gemm of Transformer Engine's experts with biases goes without the fusion of bias and dropout: add "
            "--no-bias-dropout-fusion, or --disable-bias-linear."
        )


def _rotates(args: argparse.Namespace) -> bool:
    """Whether pairs of a head's channels are turned."""
    return args.position_embedding_type in ROTATED or args.use_rotary_position_embeddings


def _rotated_channels(args: argparse.Namespace) -> int | None:
    """Of a head; None where none are, or where MLA says how many."""
    dim = args.kv_channels or (args.hidden_size and args.num_attention_heads and args.hidden_size // args.num_attention_heads)
    return int(dim * args.rotary_percent) if _rotates(args) and dim and not args.multi_latent_attention else None


def _batch(args: argparse.Namespace) -> Iterator[str]:
    for name, use in GONE.items():
        if getattr(args, name) is not None:
            yield f"{as_flag(name)} is no longer: use {use} in its place."
    if args.step_batch_size_schedule is not None and args.global_batch_size is not None:
        yield "--step-batch-size-schedule and --global-batch-size exclude each other: leave one of them out."
    if args.micro_batch_size is None:
        yield "--micro-batch-size is missing: use 1, or more sequences at a time."
    if args.dataloader_type == "external":
        yield "--dataloader-type external is for loaders of one's own, and this entry point has none: use single or cyclic."
    # Megatron divides by it
    if args.eval_interval is None and not (args.skip_train or args.full_validation):
        never = "" if args.eval_iters == 0 else " To evaluate never, add --eval-iters 0 too."
        yield f"--eval-interval is missing, by which Megatron divides: add --eval-interval 1000.{never}"


def _saves(args: argparse.Namespace) -> Iterator[str]:
    every, keep = args.save_interval, args.save_retain_interval
    if args.save is not None and (every is None or every < 1):
        given = "needs --save-interval" if every is None else f"with --save-interval {every} would save never"
        yield f"--save {args.save} {given}: add --save-interval N, such as 500 iterations."
    elif args.save is not None and keep is not None and (keep < 1 or keep % every):
        use = either(multiples(max(0, keep), every))
        yield f"--save-retain-interval {keep} must be a multiple of --save-interval {every}: use {use}."
    if args.non_persistent_save_interval and args.non_persistent_ckpt_type is None:
        yield (
            f"--non-persistent-save-interval {args.non_persistent_save_interval} needs --non-persistent-ckpt-type: add "
            "--non-persistent-ckpt-type global, or leave it out."
        )
    if args.save is not None and args.async_save and args.ckpt_format == "torch":
        yield "--async-save is not done with --ckpt-format torch: leave it out, or use --ckpt-format torch_dist."
    if args.log_memory_interval is not None and args.log_interval > 0 and args.log_memory_interval % args.log_interval:
        yield (
            f"--log-memory-interval {args.log_memory_interval} must be a multiple of --log-interval {args.log_interval}: use "
            f"{either(multiples(args.log_memory_interval, args.log_interval))}."
        )


def _wandb(args: argparse.Namespace) -> Iterator[str]:
    """What W&B's writer asks for on the last rank, once all have met."""
    if not (project := args.wandb_project):
        return
    if args.wandb_exp_name == "":  # not given, W&B makes one up
        yield f"--wandb-project {project} with an empty --wandb-exp-name: give --wandb-exp-name NAME, the run's."
    if not args.wandb_save_dir and args.save is None:
        yield f"--wandb-project {project} has nowhere to keep its files: add --wandb-save-dir DIR, or --save DIR."
