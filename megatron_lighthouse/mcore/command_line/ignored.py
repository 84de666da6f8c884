"""Options that Megatron takes and, beside the others of a command line, does not read: said, for a recipe may give them.

Imports no Megatron.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_lighthouse.mcore.command_line import graphs
from megatron_lighthouse.mcore.command_line.flags import listed
from megatron_lighthouse.mcore.data.tokenizers import takes_size
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.usage import as_flag
from megatron_lighthouse.variants import VARIANTS

type Args = argparse.Namespace


@dataclass(frozen=True)
class Rule:
    """Options that are read under one condition."""

    names: str
    """A pattern of arguments, as Megatron names them."""
    read: Callable[[Args], bool]
    because: str
    """What the words lack, or have, where they are not read."""


RULES = (
    Rule(
        "vocab_size",
        lambda args: takes_size(args.tokenizer_type) or not args.pad_vocab_size,
        "with such a --tokenizer-type, whose own size the model has (--padded-vocab-size sets another)",
    ),
    Rule(
        "lighthouse_.*",
        lambda args: (of := VARIANTS[args.attention]).switches or of.around == args.lighthouse_around,
        "without --attention lighthouse, or what --lighthouse-around names for its stage 2",
    ),
    Rule("num_query_groups", lambda args: args.group_query_attention, "without --group-query-attention"),
    Rule("lr_wsd_decay_(iters|samples|style)", lambda args: args.lr_decay_style == "WSD", "without --lr-decay-style WSD"),
    Rule(
        "rotary_.*|use_rope_scaling|rope_scaling_factor|no_rope_freq",
        lambda args: args.position_embedding_type != "none" or args.multi_latent_attention,
        "with --position-embedding-type none",
    ),
    Rule("moe_.*", lambda args: bool(args.num_experts), "without --num-experts"),
    Rule("mtp_.*", lambda args: bool(args.mtp_num_layers), "without --mtp-num-layers"),
    Rule(
        "cuda_graph_(modules|scope_deprecated)|inference_cuda_graph_scope",
        lambda args: graphs.kind_of(args) != "none",
        "without --cuda-graph-impl",
    ),
    Rule(
        "cuda_graph_warmup_steps",
        lambda args: graphs.kind_of(args) != "none" or args.optimizer_cuda_graph,
        "without --cuda-graph-impl or --optimizer-cuda-graph",
    ),
    Rule("fp8_.*", lambda args: bool(args.fp8), "without --fp8-format"),
    Rule("fp4_.*", lambda args: bool(args.fp4), "without --fp4-format"),
    Rule("(initial_|min_)?loss_scale(_window)?|hysteresis", lambda args: args.fp16, "without --fp16"),
    Rule("muon_.*", lambda args: "muon" in args.optimizer, "without --optimizer muon"),
    Rule("window_attn_skip_freq", lambda args: bool(args.window_size), "without --window-size"),
    Rule(
        "hierarchical_context_parallel_sizes",
        lambda args: "a2a+p2p" in args.cp_comm_type,
        "without --cp-comm-type a2a+p2p",
    ),
    Rule(
        "recompute_(method|num_layers|modules)",
        lambda args: bool(args.recompute_granularity or args.recompute_activations),
        "without --recompute-granularity",
    ),
    Rule("recompute_modules", lambda args: args.recompute_granularity != "full", "with --recompute-granularity full"),
    Rule(
        "q_lora_rank|kv_lora_rank|qk_head_dim|qk_pos_emb_head_dim|v_head_dim",
        lambda args: args.multi_latent_attention,
        "without --multi-latent-attention",
    ),
)


def remarks(args: Args) -> Iterator[str]:
    """What is given and not read, each rule's in a sentence.

    Args:
        args: as the words say, not validated; with what `flags.parse` says of them.
    """
    if args.use_checkpoint_args or args.hybrid_layer_pattern or args.hybrid_override_pattern:
        return  # which say more of the model than the words do
    flag_of = {flag["dest"]: flag["flags"][0] for flag in listed()}
    flag_of |= {name: as_flag(name) for name in sorted(args.said - flag_of.keys())}  # ours
    for rule in RULES:
        if not rule.read(args) and (unread := [flag_of[n] for n in flag_of if n in args.said and re.fullmatch(rule.names, n)]):
            yield f"{', '.join(unread)} {'is' if len(unread) == 1 else 'are'} not read {rule.because}."


def say(args: Args) -> None:
    """Say so, on the first rank."""
    for remark in remarks(args):
        say_once(remark)
