"""What Megatron-core 0.19 refuses without a word, or late: said before, with what works. Imports no Megatron.

Its own rules are bare assertions in `validate_args` and `OptimizerParamScheduler`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.mcore.command_line import flags, hybrid, numbers, together
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments
from megatron_lighthouse.mcore.command_line.layers import hybrid_pattern, is_latent, local_window_problem

SCHEMES = (*COMM_TYPES, "a2a+p2p")
"""Of --cp-comm-type, for which Megatron takes any word."""
ROTATED = ("rope", "yarn", "mrope")
"""Of --position-embedding-type: what turns pairs of a head's channels."""


def given(words: Sequence[str]) -> argparse.Namespace | None:
    """The arguments of a command line as it says them; None where Megatron's parser will refuse it, or tell what it takes."""
    if {"-h", "--help"} & {*words}:
        return None
    try:
        return flags.parse(words, with_all_arguments, strict=False)[0]
    except flags.WordsError:
        return None


def check(args: argparse.Namespace) -> None:
    """Of a run, before Megatron validates.

    Raises:
        ValueError: what Megatron would refuse without saying why.
    """
    if found := [*problems(args)]:
        raise ValueError("\n".join(found))


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Why Megatron would not train.

    Args:
        args: as the words say, not validated.
    """
    if found := [*numbers.problems(args)]:  # with which no other rule can reckon
        yield from found
        return
    if not args.use_checkpoint_args:  # else they may be the checkpoint's
        yield from hybrid.word_problems(args)
        yield from _model(args)
        yield from together.model_problems(args)
    yield from together.problems(args)
    yield from _batch(args)
    yield from _saves(args)
    if not args.skip_train:
        yield from _rates(args)
    for one, other in (("fp16", "bf16"), ("data_path", "data_args_path")):
        if getattr(args, one) and getattr(args, other):
            yield f"{_flag(one)} and {_flag(other)} exclude each other: leave one of them out."


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _model(args: argparse.Namespace) -> Iterator[str]:
    needed = ["hidden_size", "num_attention_heads", "max_position_embeddings"]
    layers = args.num_layers or args.encoder_num_layers or hybrid_pattern(args)
    needed += [] if layers or args.heterogeneous_layers_config_path else ["num_layers"]
    needed += [] if args.seq_length or args.encoder_seq_length else ["seq_length"]
    for name in needed:
        if not getattr(args, name):
            yield f"{_flag(name)} is missing: give a whole number of at least 1."
    hidden, heads = args.hidden_size, args.num_attention_heads
    if hidden and heads and args.kv_channels is None and hidden % heads:
        yield (
            f"--hidden-size {hidden} must be a multiple of --num-attention-heads {heads} where --kv-channels is not given: use "
            f"{-(-hidden // heads) * heads}, or give --kv-channels."
        )
    if (dim := _rotated_channels(args)) is not None and (dim < 2 or (dim % 2 and args.rotary_percent == 1)):
        yield (
            f"--kv-channels {args.kv_channels or hidden // heads} (where not given, --hidden-size / --num-attention-heads) "
            f"with --rotary-percent {args.rotary_percent:g} are {dim} channels, and RoPE turns pairs: use --kv-channels "
            f"{dim + dim % 2 or 2} and --rotary-percent 1."
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
    groups = args.num_query_groups if args.group_query_attention else None
    if heads and groups and heads % groups:
        yield (
            f"--num-attention-heads {heads} must be a multiple of --num-query-groups {groups}: use --num-attention-heads "
            f"{-(-heads // groups) * groups}, or --num-query-groups {math.gcd(heads, groups)}."
        )
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


def _experts(args: argparse.Namespace, layers: int | None) -> Iterator[str]:
    experts, ranks, pattern = args.num_experts, args.expert_model_parallel_size, args.moe_layer_freq
    if not experts:
        return
    if args.moe_router_topk > experts:
        yield f"--moe-router-topk {args.moe_router_topk} must be at most --num-experts {experts}: use {min(2, experts)}, or so."
    if experts % ranks:
        yield (
            f"--num-experts {experts} must be a multiple of --expert-model-parallel-size {ranks}: use "
            f"--expert-model-parallel-size {math.gcd(experts, ranks)}, or --num-experts {-(-experts // ranks) * ranks}."
        )
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


def _rotated_channels(args: argparse.Namespace) -> int | None:
    """Of a head; None where none are, or where MLA says how many."""
    rotates = args.position_embedding_type in ROTATED or args.use_rotary_position_embeddings
    dim = args.kv_channels or (args.hidden_size and args.num_attention_heads and args.hidden_size // args.num_attention_heads)
    return int(dim * args.rotary_percent) if rotates and dim and not args.multi_latent_attention else None


def _batch(args: argparse.Namespace) -> Iterator[str]:
    if args.micro_batch_size is None:
        yield "--micro-batch-size is missing: use 1, or more sequences at a time."
    # Megatron divides by it
    if args.eval_interval is None and not (args.skip_train or args.full_validation):
        yield "--eval-interval is missing: give a number of iterations, such as 1000. To evaluate never, add --eval-iters 0."


def _saves(args: argparse.Namespace) -> Iterator[str]:
    every, keep = args.save_interval, args.save_retain_interval
    if args.save is not None and (every is None or every < 1):
        given = "needs --save-interval" if every is None else f"with --save-interval {every} would save never"
        yield f"--save {args.save} {given}: add --save-interval N, such as 500 iterations."
    elif args.save is not None and keep is not None and (keep < 1 or keep % every):
        use = max(1, keep // every) * every
        yield f"--save-retain-interval {keep} must be a multiple of --save-interval {every}: use {use}."
    if args.save is not None and args.async_save and args.ckpt_format == "torch":
        yield "--async-save is not done with --ckpt-format torch: leave it out, or use --ckpt-format torch_dist."
    if args.log_memory_interval is not None and args.log_interval > 0 and args.log_memory_interval % args.log_interval:
        yield (
            f"--log-memory-interval {args.log_memory_interval} must be a multiple of --log-interval {args.log_interval}: use "
            f"{-(-args.log_memory_interval // args.log_interval) * args.log_interval}."
        )


def _rates(args: argparse.Namespace) -> Iterator[str]:
    """Of the learning rate and the weight decay."""
    if args.lr is None:
        yield "--lr is missing: give a learning rate, such as 3e-4."
    elif args.lr < 0:
        yield f"--lr {args.lr} must not be negative: use a learning rate such as 3e-4."
    elif not 0 <= args.min_lr <= args.lr or not 0 <= args.lr_warmup_init <= args.lr:
        use = " and ".join(
            f"{_flag(name)} {args.lr / 10 if name == 'min_lr' else 0:g}"
            for name in ("min_lr", "lr_warmup_init")
            if not 0 <= getattr(args, name) <= args.lr
        )
        yield (
            f"--lr {args.lr} must be at least --min-lr {args.min_lr} and --lr-warmup-init {args.lr_warmup_init}, and none of "
            f"them negative: use {use}, or a greater --lr."
        )
    ends = (args.start_weight_decay, args.end_weight_decay)
    if args.weight_decay_incr_style == "constant":
        if ends != (None, None):
            yield (
                "--start-weight-decay and --end-weight-decay mean nothing with --weight-decay-incr-style constant: use linear."
            )
    elif None in ends:
        yield (
            f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay and --end-weight-decay: add "
            "both."
        )
    decays, warms = args.lr_decay_iters or args.train_iters, args.lr_warmup_iters
    if decays and warms and warms >= decays:
        yield (
            f"--lr-warmup-iters {warms} must be below the {decays} iterations of --lr-decay-iters (where not given, "
            f"--train-iters): use {decays // 50} or so, or --lr-warmup-fraction 0.02."
        )
    falls = args.lr_wsd_decay_iters
    if args.lr_decay_style == "WSD" and decays and falls and falls > decays:
        yield (
            f"--lr-wsd-decay-iters {falls} must be at most the {decays} iterations of --lr-decay-iters (where not given, "
            f"--train-iters): use {max(1, decays // 20)} or so."
        )
    share = args.lr_warmup_fraction
    if share is not None and not 0 <= share < 1:
        yield f"--lr-warmup-fraction {share} must be from 0 up to, not including, 1: use 0.02."
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None and args.lr_wsd_decay_samples is None:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters: add the number of last iterations in which the rate falls."
