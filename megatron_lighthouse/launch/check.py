"""`python -m megatron_lighthouse.launch.check`: refuse a run before it is queued. Imports no Megatron.

Looks at the layout on these nodes, the sizes of Lighthouse, whether the data is there, and the memory as the plan counts it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_lighthouse.launch import restart
from megatron_lighthouse.launch.data_files import checkpoint, data, here, unseen
from megatron_lighthouse.launch.sizes import sizes
from megatron_lighthouse.mcore.command_line import pyramid
from megatron_lighthouse.mcore.command_line.settings import add_arguments, settings_from
from megatron_lighthouse.mcore.data import blends
from megatron_lighthouse.mcore.data.text import PADDED_VOCABULARY
from megatron_lighthouse.plan import memory
from megatron_lighthouse.plan.device import DEVICES, Device
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.words import RECOMPUTE_WORDS, run_of_words
from megatron_lighthouse.variants import DENSE, VARIANTS

ENDS = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
"""Each counts as a layer where the pipeline is split."""

KINDS = {"hopper": ("h100", "h200"), "blackwell": ("b200", "gb200"), "cpu": ()}
"""Devices of an architecture, as the plan names them. The first has the least memory, and is taken where none is named."""
REFUSED = 1.25
"""Memory over what a run may allocate above which it is refused: the count may be wrong by 10%, and no logits were measured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line; answers an exit status."""
    parser = argparse.ArgumentParser(prog="python -m megatron_lighthouse.launch.check", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--gpus-per-node", type=int, required=True, help="GPUs, and so processes, of a node")
    parser.add_argument(
        "--point", action="append", default=[], metavar="'NAME WORDS'", help="a point of a study: its name, and what it adds"
    )
    parser.add_argument("--arch", choices=KINDS, default="cpu", help="of the GPUs; with cpu memory is not looked at")
    parser.add_argument("--device", default="", help="which GPU of that architecture; another is not heeded")
    parser.add_argument(
        "--sees",
        default="",
        help="what the job's container sees, apart by colons: FOLDER, or FOLDER=HERE; none: no container",
    )
    parser.add_argument("--exact", action="store_true", help="a run takes just the GPUs of one sequence, of those given")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="Megatron's command line")
    options = parser.parse_args(argv)
    words = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    kinds = KINDS[options.arch]
    device = DEVICES[options.device if options.device in kinds else kinds[0]] if kinds else None
    points = [point.split() for point in options.point] or [[""]]
    folders = (folder.partition("=") for folder in options.sees.split(":") if folder)
    sees = {inside: outside or inside for inside, _, outside in folders}
    wrong: list[str] = []
    lines: list[str] = []
    for name, *more in points:
        args = parse([*words, *more])
        vars(args).update(pyramid.choice(args, here(sees, args.load) if args.load else None)[0])
        world = options.nodes * options.gpus_per_node
        problems = [*enough(args, world)] if options.exact else []
        world = one_sequence(args) if options.exact else world
        nodes, gpus_per_node = (1, world) if options.exact else (options.nodes, options.gpus_per_node)
        problems += [*layout(args, nodes, gpus_per_node), *sizes(args)]
        problems += [*data(args, sees), *checkpoint(args, sees), *unseen(args, sees)]
        problems += restart.problems(args, here(sees, args.load) if args.load else None)
        run = counted([*words, *more], args, device, world) if device and not problems else None
        problems += [*too_much(run if names_vocabulary([*words, *more]) else without_logits(run))] if run else []
        prefix = f"{name}: " if name else ""
        wrong += [prefix + problem for problem in problems]
        lines += [] if problems else [prefix + summary(args, world) + (f"; {needs(run)}" if run else "")]
    if wrong:
        print("The run cannot start as asked:\n  - " + "\n  - ".join(wrong), file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Those of Megatron's arguments that the rules need; others pass unread."""
    parser = add_arguments(argparse.ArgumentParser(prog="recipe", allow_abbrev=False, add_help=False))
    restart.add_arguments(blends.add_arguments(parser))
    for name, default in (
        *(("tensor-model-parallel-size", 1), ("pipeline-model-parallel-size", 1), ("context-parallel-size", 1)),
        *(("num-layers", None), ("num-attention-heads", None), ("num-query-groups", 1), ("seq-length", None)),
        *(("max-position-embeddings", None), ("micro-batch-size", 1), ("global-batch-size", None), ("train-iters", None)),
        ("encoder-seq-length", None),
        *(("decoder-first-pipeline-num-layers", None), ("decoder-last-pipeline-num-layers", None)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("--cp-comm-type", "--spec"):
        parser.add_argument(name, nargs="*", default=[])
    for name in ("--pretrained-checkpoint", "--pipeline-model-parallel-layout", "--heterogeneous-layers-config-path"):
        parser.add_argument(name)
    parser.add_argument("--attention-dropout", type=float, default=0.1)  # Megatron's
    for name in ("--skip-train", "--use-checkpoint-args", "--group-query-attention", *ENDS):
        parser.add_argument(name, action="store_true")
    args = parser.parse_known_args(words)[0]
    args.seq_length = args.encoder_seq_length if args.seq_length is None else args.seq_length
    if not args.group_query_attention:  # as Megatron, which then does not read it
        args.num_query_groups = None
    return args


def one_sequence(args: argparse.Namespace) -> int:
    """GPUs that hold one copy of the model and one sequence."""
    return args.tensor_model_parallel_size * args.context_parallel_size * args.pipeline_model_parallel_size


def enough(args: argparse.Namespace, gpus: int) -> Iterator[str]:
    """Whether one sequence fits on these GPUs."""
    if (one := one_sequence(args)) > gpus:
        yield (
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} x --context-parallel-size "
            f"{args.context_parallel_size} x --pipeline-model-parallel-size {args.pipeline_model_parallel_size} = {one} GPUs, "
            f"and there are {gpus}: use smaller sizes (CP of --study), or more --gpus."
        )


def layout(args: argparse.Namespace, nodes: int, gpus_per_node: int) -> Iterator[str]:
    """The arithmetic of tensor, context, pipeline and data parallel ranks."""
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    pipeline, world = args.pipeline_model_parallel_size, nodes * gpus_per_node
    one = one_sequence(args)
    flags = (("tensor-model", tensor), ("context", context), ("pipeline-model", pipeline))
    product = " x ".join(f"--{name}-parallel-size {size}" for name, size in flags)
    if world % one:
        fits = [n for n in range(1, 4 * one + 1) if n * gpus_per_node % one == 0]
        fit = " or ".join(map(str, sorted(sorted(fits, key=lambda n: abs(n - nodes))[:2])))
        yield (
            f"{product} = {one} must divide the GPUs of the job, {nodes} nodes x {gpus_per_node} = {world}: use --nodes {fit}, "
            "or smaller sizes."
        )
    elif args.global_batch_size and args.global_batch_size % (args.micro_batch_size * (world // one)):
        unit = args.micro_batch_size * (world // one)
        yield (
            f"--global-batch-size {args.global_batch_size} must be a multiple of {unit} (--micro-batch-size "
            f"{args.micro_batch_size} x {world // one} data-parallel ranks): use {-(-args.global_batch_size // unit) * unit}."
        )
    yield from stages(args)
    heads, groups = args.num_attention_heads, args.num_query_groups or args.num_attention_heads
    copied = VARIANTS[args.attention].native and groups and tensor % groups == 0  # Megatron gives several ranks the same group
    unknown = copied or args.use_checkpoint_args  # then it is the checkpoint's, whatever is said here
    for name, size in (("num-attention-heads", heads), ("num-query-groups", args.num_query_groups)):
        if size and size % tensor and not (name == "num-query-groups" and unknown):
            yield f"--{name} {size} must be a multiple of --tensor-model-parallel-size {tensor}: use a divisor of {size}."
    groups = max(1, (groups or context * tensor) // tensor)
    if "a2a" in args.cp_comm_type and groups % context:
        yield (
            f"--cp-comm-type a2a shares out a tensor-parallel rank's {groups} key/value heads, and --context-parallel-size "
            f"{context} does not divide them: use --cp-comm-type p2p, or a divisor of {groups}."
        )


def stages(args: argparse.Namespace) -> Iterator[str]:
    """Whether the layers make pipeline stages of one size. Where the command line gives the sizes, Megatron checks them."""
    own = ("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    if not args.num_layers or any(getattr(args, name) is not None for name in own):
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


def counted(words: Sequence[str], args: argparse.Namespace, device: Device, world: int) -> Run | None:
    """The run as the plan counts it, of both its stages the one that needs more; None where the plan knows no such model."""
    try:
        run = run_of_words(words, device, world)
    except ValueError:
        return None
    return max([run, run.change(attention=DENSE.name)] if args.lighthouse_stage2_at else [run], key=memory.total)


def needs(run: Run) -> str:
    """The memory of a GPU, in words."""
    total, usable = memory.total(run), run.device.usable_bytes
    found = f"{total / 2**30:.1f} of {usable / 2**30:.1f} GiB by the plan ({run.device.name}, vocabulary {run.model.vocab:,})"
    return found if total <= usable else f"{found}: IT MAY RUN OUT OF MEMORY"


def names_vocabulary(words: Sequence[str]) -> bool:
    """Whether the rows of the vocabulary are known here: else a tokenizer says so when the run starts."""
    return any(word.partition("=")[0] in ("--vocab-size", "--text-data") for word in words)


def without_logits(run: Run) -> Run:
    """With as small a vocabulary as there is: no run is refused for what is only assumed."""
    return run.change(model=replace(run.model, vocab=PADDED_VOCABULARY))


def too_much(run: Run) -> Iterator[str]:
    """Whether the run needs far more memory than a GPU has."""
    total, usable = memory.total(run), run.device.usable_bytes
    if total <= REFUSED * usable:
        return
    use = " or ".join(enough_memory(run)) or "more of --context-parallel-size and recompute together, or a shorter --seq-length"
    yield (
        f"--seq-length {run.seq_length} needs {total / 2**30:.1f} GiB of a GPU by the plan, with a vocabulary of "
        f"{run.model.vocab:,} (--vocab-size), and {usable / 2**30:.1f} are there ({run.device.name}; "
        f"where the nodes have others, --check 0 of submit.sh): use {use}."
    )


def enough_memory(run: Run) -> Iterator[str]:
    """Single changes with which it fits: what it recomputes, or as few more context- or tensor-parallel ranks as it takes."""
    tp, cp = run.tensor_parallel, run.context_parallel
    for tries in (
        [("no --cross-entropy-loss-fusion", {"loss_fusion": False})] if run.loss_fusion else [],
        [(RECOMPUTE_WORDS[name], {"recompute": name}) for name in ("mlp", "full")],
        [(f"--context-parallel-size {cp * n}", {"context_parallel": cp * n}) for n in (2, 4, 8, 16, 32)],
        [(f"--tensor-model-parallel-size {tp * n} --sequence-parallel", {"tensor_parallel": tp * n}) for n in (2, 4, 8)],
    ):
        yield from [text for text, change in tries if _fits(run.change(**change))][:1]


def _fits(run: Run) -> bool:
    """On these GPUs, or on just those of one sequence where it takes more."""
    one = run.tensor_parallel * run.context_parallel * run.pipeline_parallel
    gpus = max(run.gpus, one)
    try:
        return memory.fits(run.change(gpus=gpus, global_batch=gpus // one).check())
    except ValueError:
        return False


def summary(args: argparse.Namespace, world: int) -> str:
    """What will run, in one line."""
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    pipeline = args.pipeline_model_parallel_size
    layout = f"TP {tensor} x CP {context} x PP {pipeline} x DP {world // (tensor * context * pipeline)}"
    line = f"{world} ranks = {layout}; {args.seq_length or "the checkpoint's"} tokens, {args.attention}"
    variant = VARIANTS[args.attention]
    if variant.selects and args.seq_length:
        settings = settings_from(args)
        rows = variant.cost(settings.config, args.seq_length, context).gathered_length
        line += f", {rows} rows attended (L {settings.config.levels}, k {settings.config.budget})"
        if settings.edge:
            rows = variant.cost(settings.edge, args.seq_length, context).gathered_length
            line += f", {rows} in the first and last layers"
    return line


if __name__ == "__main__":
    sys.exit(main())
