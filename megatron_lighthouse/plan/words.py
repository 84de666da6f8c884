"""Megatron's command line to the plan's `Run`, and the flags of a layout. Reads as Megatron 0.19 does; imports none of it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.mcore.command_line import documents, flags, graphs, tiles
from megatron_lighthouse.mcore.command_line.checks import argument_problems
from megatron_lighthouse.mcore.command_line.settings import add_arguments, settings_from
from megatron_lighthouse.mcore.data import vocabulary
from megatron_lighthouse.mcore.data.blends import Here
from megatron_lighthouse.plan.device import Device
from megatron_lighthouse.plan.model import GPT, UNTIED
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.usage import as_sentence
from megatron_lighthouse.variants import VARIANTS, base_in, counted, named_in

LLAMA3_VOCAB = 128256
"""Rows of the vocabulary where neither the words nor a tokenizer that is here say: that of the recipes."""
SIZES = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length")
NEEDED = ("--swiglu", "--bf16", "--use-distributed-optimizer")
NOT_COUNTED = (
    *("--num-experts", "--multi-latent-attention", "--window-size", "--experimental-attention-variant", "--mtp-num-layers"),
    "--yaml-cfg",
    *("--is-hybrid-model", "--hybrid-layer-pattern", "--hybrid-override-pattern", "--heterogeneous-layers-config-path"),
    "--heterogeneous-layers-config-encoded-json",
    *("--fp8-format", "--fp4-format", "--use-precision-aware-optimizer", "--optimizer-cpu-offload"),
    *("--use-megatron-fsdp", "--use-torch-fsdp2", "--cpu-offloading-num-layers", "--fine-grained-activation-offloading"),
    *("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank", "--skip-train"),
    *("--pipeline-model-parallel-layout", "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
    *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
)
"""Flags that change what takes memory in ways that the plan does not know."""
OPTIONS = {"attention_dropout": 0.0, "softmax_type": "vanilla", "cuda_graph_impl": "none"}
OPTIONS |= dict.fromkeys(("qk_layernorm", "qk_l2_norm", "qk_clip", "log_max_attention_logit"), False)
"""Arguments of the model that Lighthouse may refuse, by their names, and what it is without them."""
REFUSED = ("sft", "reset_attention_mask", "dataloader_inter_document_masking", "hybrid_context_parallel", "perform_rl_step")
"""Arguments of the run, likewise."""
TOKENIZER = ("--tokenizer-type", "--tokenizer-model")
RECOMPUTE_WORDS = {
    "none": "",
    "mlp": "--recompute-granularity selective --recompute-modules mlp",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}


def recipe_words(path: Path) -> list[str]:
    """The words of a recipe of launch/: apart by blanks, # begins a comment. As launch/common.sh reads it, without a byte order
    mark and DOS line ends.

    Raises:
        ValueError: a file that cannot be read, or has characters that are neither of a word nor blanks.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe {path} cannot be read ({error}): name a text file of Megatron's arguments.") from error
    lines = [line.removesuffix("\r").split("#")[0] for line in lines]
    for number, line in enumerate(lines, 1):
        if odd := [c for c in line if c != "\t" and (c < " " or c in "\x7f\xa0")]:
            raise ValueError(
                f"{path}, line {number}: {line!r} has {odd[0]!r}, which no blank or word has: write plain blanks, and UTF-8."
            )
    return [word for line in lines for word in re.split(r"[ \t]+", line) if word]


def run_of_words(words: Sequence[str], device: Device, gpus: int | None = None, here: Here = Path) -> Run:
    """The run that these words ask for, not yet checked.

    Args:
        gpus: of the job; those of one sequence where None.
        here: where a path of the words is on this machine.

    Without --global-batch-size each data-parallel rank has one sequence, as in Megatron.

    Raises:
        ValueError: a model or a setting that the plan does not count.
    """
    names = {word.partition("=")[0] for word in words}
    if odd := [flag for flag in NOT_COUNTED if flag in names]:
        raise ValueError(f"{' '.join(odd)} is not counted by the plan: leave it out, to plan the run without it.")
    if lacking := [flag for flag in (*SIZES, *NEEDED) if flag not in names]:
        raise ValueError(f"the plan counts Llamas in bf16, and {' '.join(lacking)} is missing: add it.")
    args = _parse(words)
    if wrong := next(_not_counted(args), None):
        raise ValueError(wrong)
    tp, cp, pp = args.tensor_model_parallel_size, args.context_parallel_size, args.pipeline_model_parallel_size
    settings, gpus = settings_from(args), max(1, tp * cp * pp) if gpus is None else gpus
    if args.graphs == graphs.AUTO and args.cuda_graph_impl == "none":
        args.cuda_graph_impl = _by_itself(words, gpus)
    if VARIANTS[args.attention].selects and (found := [*argument_problems(args, settings)]):
        raise ValueError("\n".join(found))
    return Run(
        model=_model(args, vocabulary.rows(args, here) or LLAMA3_VOCAB),
        seq_length=args.seq_length,
        device=device,
        attention=args.attention,
        **({"config": settings.config} if settings.attention.switches else {}),  # else that of the length
        gpus=gpus,
        tensor_parallel=tp,
        context_parallel=cp,
        pipeline_parallel=pp,
        global_batch=args.global_batch_size or max(1, gpus // max(1, tp * cp * pp)),
        recompute=_recompute(args),
        cp_comm_type=args.cp_comm_type[0] if args.cp_comm_type else "p2p",
        discard_output=settings.discard_output,
        edge_budget=settings.edge_budget,
        loss_fusion=args.cross_entropy_loss_fusion,
        gradient_bytes=2 if args.grad_reduce_in_bf16 else 4,
        loss_tile_tokens=args.loss_tile_tokens,
        mlp_tile_tokens=args.mlp_tile_tokens,
        around=settings.base_config if settings.base.config else None,
        options={name: getattr(args, name) for name, default in OPTIONS.items() if getattr(args, name) != default},
    )


def assumes_rows(words: Sequence[str]) -> bool:
    """Whether neither these words nor a tokenizer that is here say how many rows the vocabulary has."""
    return vocabulary.rows(_parse(words), Path) is None


def _by_itself(words: Sequence[str], gpus: int) -> str:
    """The --cuda-graph-impl that `--graphs auto` takes."""
    from megatron_lighthouse.mcore.command_line.entry import with_all_arguments  # and torch with it

    return graphs.choice(flags.parse(words, with_all_arguments, strict=False)[0], gpus)[0] or "none"


def _not_counted(args: argparse.Namespace) -> Iterator[str]:
    """Why the plan does not know what these arguments ask for."""
    if args.attention not in counted():
        yield f"--attention {args.attention} is not counted by the plan: use {' or '.join(counted())}."
    if (base := base_in(args)) is not None and not base.counted:
        named = named_in(args)
        yield f"--attention {named} is not counted by the plan: leave --lighthouse-around out, to plan it with softmax."
    if args.transformer_impl == "local":
        yield "--transformer-impl local is not counted by the plan: use transformer_engine."
    if documents.asked(args):
        yield f"{documents.flag_of(args)} is not counted by the plan of a recipe: give --document-lengths FILE in its place."
    if args.micro_batch_size != 1:
        yield f"--micro-batch-size {args.micro_batch_size} is not counted by the plan: use 1."
    if (tp := args.tensor_model_parallel_size) > 1 and not args.sequence_parallel:
        yield f"--tensor-model-parallel-size {tp} is counted with --sequence-parallel: add it."
    if len(schemes := set(args.cp_comm_type)) > 1 or not schemes <= set(COMM_TYPES):
        yield f"--cp-comm-type: the plan counts one of {', '.join(COMM_TYPES)}."
    if args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == "te":
        other = "use native, or leave --cross-entropy-loss-fusion out"
        yield f"--cross-entropy-fusion-impl te is refused by Megatron 0.19: {other}."


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = add_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False))
    tiles.add_arguments(parser)
    graphs.add_arguments(parser)
    for flag in (
        *SIZES,
        "--ffn-hidden-size",
        "--kv-channels",
        "--vocab-size",
        "--padded-vocab-size",
        "--global-batch-size",
        "--recompute-num-layers",
    ):
        parser.add_argument(flag, type=int)
    for name in ("tensor-model-parallel-size", "context-parallel-size", "pipeline-model-parallel-size"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--num-query-groups", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    for flag in (*TOKENIZER, "--recompute-granularity", "--recompute-method", "--transformer-impl"):
        parser.add_argument(flag)
    parser.add_argument("--no-pad-vocab-size", "--disable-pad-vocab-size", action="store_false", dest="pad_vocab_size")
    for flag in ("--group-query-attention", "--sequence-parallel", "--recompute-activations", UNTIED):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--attention-dropout", type=float, default=0.1)  # Megatron's
    for name in (*OPTIONS, *REFUSED, "cross_entropy_loss_fusion", "grad_reduce_in_bf16"):
        flag, default = f"--{name.replace('_', '-')}", OPTIONS.get(name, False)
        if default is False:
            parser.add_argument(flag, action="store_true")
        elif name != "attention_dropout":
            parser.add_argument(flag, default=default)
    parser.add_argument("--cross-entropy-fusion-impl", default="native")
    for flag in ("--cp-comm-type", "--recompute-modules", "--text-data"):
        parser.add_argument(flag, nargs="*", default=[])
    try:
        return parser.parse_known_args(words)[0]
    except argparse.ArgumentError as error:  # argparse would end the program with the usage of a parser that no user knows
        raise ValueError(as_sentence(f"{error.argument_name}: {error.message}")) from error


def _model(args: argparse.Namespace, rows: int) -> GPT:
    """The model, with what Megatron takes where a size is not given."""
    hidden, heads = args.hidden_size, args.num_attention_heads
    if not args.kv_channels and (heads < 1 or hidden % heads):
        raise ValueError(
            f"--hidden-size {hidden} must be a multiple of --num-attention-heads {heads} where --kv-channels is not given: "
            f"use {-(-hidden // max(1, heads)) * max(1, heads)}, or give --kv-channels."
        )
    return GPT(
        layers=args.num_layers,
        hidden=hidden,
        ffn=args.ffn_hidden_size or hidden * 8 // 3 // 64 * 64,
        heads=heads,
        groups=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels or hidden // heads,
        vocab=rows,
        dense_first=args.lighthouse_dense_first,
        dense_last=args.lighthouse_dense_last,
        tied=not args.untie_embeddings_and_output_weights,
    )


def _recompute(args: argparse.Namespace) -> str:
    """How it recomputes, in the plan's words: recomputing less than the MLP counts as nothing."""
    if args.recompute_granularity == "full" and not args.recompute_activations:
        if (args.recompute_method, args.recompute_num_layers) != ("uniform", 1):
            raise ValueError(f"--recompute-granularity full is counted as {RECOMPUTE_WORDS['full']}: use that.")
        return "full"
    selective = args.recompute_activations or args.recompute_granularity == "selective"
    return "mlp" if selective and "mlp" in args.recompute_modules else "none"


def layout_words(run: Run) -> str:
    """The flags of a run's layout."""
    found = f"--tensor-model-parallel-size {run.tensor_parallel} --context-parallel-size {run.context_parallel}"
    found += f" --pipeline-model-parallel-size {run.pipeline_parallel}"
    found += f" --cp-comm-type {run.cp_comm_type}" if run.context_parallel > 1 else ""
    found += " --sequence-parallel" if run.tensor_parallel > 1 else ""
    return f"{found} {recompute_words(run)}".rstrip()


def recompute_words(run: Run) -> str:
    """The flags of what a run computes again in backward."""
    found = RECOMPUTE_WORDS[run.recompute]
    return f"{found} {tiles.MLP} {run.mlp_tile_tokens}".lstrip() if run.mlp_tile_tokens else found
