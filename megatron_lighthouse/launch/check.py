"""`python -m megatron_lighthouse.launch.check`: refuse a run before it is queued.

Looks at flags, layout, the sizes of the attention, whether data and tokenizer are there, and the memory as the plan counts it.
Then Megatron reads the command line, and the run's own refusals are asked, where Megatron can be imported; else the flags are
held to a list of its.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lighthouse.usage import Parser, once

if TYPE_CHECKING:
    from megatron_lighthouse.mcore.data.blends import Here

# torch takes seconds, which --help and a wrong option need not wait for: what imports it is imported late

CAPABILITY = {"blackwell": 10, "hopper": 9, "cpu": 0}
"""Of the GPUs of an architecture, the major compute capability."""
UNKNOWN = "unknown"
SOME = (1, 2, 8)
"""Times the GPUs of one sequence."""
KINDS = {"hopper": ("h100", "h200"), "blackwell": ("b200", "gb200"), "cpu": ()}
"""Devices of an architecture, as the plan names them. The first has the least memory, and is taken where none is named."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line; answers an exit status."""
    from megatron_lighthouse.launch.data_files import here
    from megatron_lighthouse.mcore.command_line import flags, graphs, ignored, kept
    from megatron_lighthouse.mcore.command_line.entry import with_all_arguments
    from megatron_lighthouse.mcore.refusal import HEADER

    parser = Parser(prog="python -m megatron_lighthouse.launch.check", description=__doc__)
    parser.add_argument("--nodes", type=int, help="nodes of the job; beside --wrong it may be missing: not known")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs, and so processes, of a node; likewise")
    parser.add_argument(
        "--point", action="append", default=[], metavar="'NAME WORDS'", help="one of several runs: its name, and what it adds"
    )
    parser.add_argument("--wrong", action="append", default=[], help="what a script refuses: said with what is found here")
    parser.add_argument(
        "--arch", choices=(*KINDS, UNKNOWN), default="cpu", help="of the GPUs; with cpu memory is not looked at"
    )
    parser.add_argument("--device", default="", help="which GPU of that architecture; another is not heeded")
    parser.add_argument(
        "--sees",
        default="",
        help="what the job's container sees, apart by colons: FOLDER, or FOLDER=HERE; none: no container",
    )
    parser.add_argument("--exact", action="store_true", help="a run takes just the GPUs of one sequence, of those given")
    what = "the Python that trains is this one: packages it lacks are refused; now: this machine trains, and no job"
    parser.add_argument("--runs-here", nargs="?", const="job", choices=("job", "now"), help=what)
    parser.add_argument(
        "--without-megatron", action="store_true", help="do not ask Megatron, which takes seconds: the run does so itself"
    )
    parser.add_argument("--without-files", action="store_true", help="look for no files: it is not known on which machine")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="Megatron's command line")
    options = parser.parse_args(argv)
    if not options.wrong and None in (options.nodes, options.gpus_per_node):
        parser.error("--nodes and --gpus-per-node are missing.")
    words = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    points = [point.split() for point in options.point] or [[""]]
    folders = (folder.partition("=") for folder in options.sees.split(":") if folder)
    options.sees = {inside: outside or inside for inside, _, outside in folders}
    wrong = [("", problem) for problem in options.wrong]
    lines, notes = list[str](), list[tuple[str, str]]()
    runs: dict[str, list[str]] = {}
    for name, *more in points:
        try:
            runs[name] = kept.resumed([*words, *more], partial(here, options.sees))
        except ValueError as error:  # of --run-folder
            wrong.append((name, str(error)))
            continue
        problems, line = quick(options, runs[name])
        wrong += [(name, problem) for problem in problems]
        if not problems:
            lines.append(f"{name}: {line}" if name else line)
            args = flags.parse(runs[name], with_all_arguments)[0]
            notes += [(name, f"note: {remark}") for remark in ignored.remarks(args)]
            if options.arch != "cpu" and (remark := graphs.remark(args, world_of(args, options))):
                notes.append((name, f"note: {remark}"))
    how = ""
    # what a script refuses hides nothing; Megatron ends with the first of its rules, which ours say before
    if len(wrong) == len(options.wrong) and is_known(options) and options.arch != UNKNOWN:
        found, how = asked_of_megatron(options, runs)
        wrong += found
    if wrong:
        print(f"{HEADER}\n  - " + "\n  - ".join(once(wrong)), file=sys.stderr)
        return 1
    print("\n".join([*lines, *once(notes), f"check: passed: {how}"]))
    return 0


def quick(options: argparse.Namespace, words: Sequence[str]) -> tuple[list[str], str]:
    """What is wrong as far as no Megatron is needed to tell; and the run in one line where nothing is."""
    from megatron_lighthouse.launch import offered, restart
    from megatron_lighthouse.launch.data_files import data, descriptions, here, unseen
    from megatron_lighthouse.launch.fits import counted, needs, too_much, without_logits
    from megatron_lighthouse.launch.layout import enough, layout
    from megatron_lighthouse.launch.sizes import sizes
    from megatron_lighthouse.mcore.command_line import flags, fp8, inner, places, precision
    from megatron_lighthouse.mcore.data import vocabulary
    from megatron_lighthouse.plan.device import DEVICES

    sees, kinds = options.sees, KINDS.get(options.arch, ())
    args, wrong, load, base = read(words, partial(here, sees))
    device = DEVICES[options.device if options.device in kinds else kinds[0]] if kinds else None
    world, known = world_of(args, options), is_known(options)
    problems = [*(enough(args, options.nodes * options.gpus_per_node) if options.exact and known else ())]
    args.world_size = world if known and not options.exact else None  # a study takes as many as a point needs
    runs_here = options.runs_here if options.arch != UNKNOWN else None
    asked_by = "--gpus" if options.runs_here == "now" else "--nodes"

    def of_sizes(tried: argparse.Namespace) -> list[str]:
        first, *others = ([*layout(tried, *one, asked_by)] for one in machines(args, options))
        on_all = (problem for problem in first if all(problem in found for found in others))
        return [*on_all, *sizes(tried, runs_here, options.arch != "cpu")]

    problems += offered.left(of_sizes(args), args, world, of_sizes)
    problems += data(args, None if options.without_files else sees)
    if not options.without_files:
        problems += [*descriptions(args, sees), *places.problems(args, partial(here, sees)), *unseen(args, sees)]
        problems += restart.problems(args, load, base)
    for of in (inner, precision, fp8) if options.arch != UNKNOWN else ():
        problems += of.device_problems(args, CAPABILITY[options.arch])
    if problems := [*wrong, *flags.apart(problems, args.malformed)]:
        return [*dict.fromkeys(problems)], ""
    if not (device and known) or args.skip_train:  # an evaluation needs less than the training that it is of
        return [], summary(args, world)
    try:
        run = counted(words, args, device, world, partial(here, sees))
    except ValueError as error:
        return [], f"{summary(args, world)}; memory is not looked at: {str(error).splitlines()[0]}"
    named = vocabulary.rows(args, partial(here, sees)) is not None
    return [*too_much(run if named else without_logits(run), named)], f"{summary(args, world)}; {needs(run, named)}"


def asked_of_megatron(options: argparse.Namespace, points: dict[str, list[str]]) -> tuple[list[tuple[str, str]], str]:
    """What Megatron and the run itself refuse, each behind the point's name; and how that was found out."""
    from megatron_lighthouse.launch import megatron
    from megatron_lighthouse.mcore.command_line import flags

    by_list = f"flags, layout, sizes, files and this project's rules, by the flags of Megatron-core {flags.VERSION}"
    by_list += "" if find_spec("torch") else f" (but not what checkpoints hold, for {sys.executable} has no torch)"
    if options.without_megatron:
        return [], f"{by_list}; Megatron's own rules are the run's to ask."
    if not megatron.can_be_asked():
        return [], f"{by_list}; Megatron is not installed here ({sys.executable}), so its own rules were not asked."
    begun, wrong = time.monotonic(), list[tuple[str, str]]()
    for name, words in points.items():
        found = megatron.problems(
            words, world_of(parse(words), options), CAPABILITY[options.arch], options.sees, options.runs_here
        )
        wrong += [(name, problem) for problem in found]
    return wrong, f"Megatron-core {flags.installed()} reads it, and nothing is refused ({time.monotonic() - begun:.0f} s)."


def read(words: Sequence[str], here: Here) -> tuple[argparse.Namespace, list[str], Path | None, Path | None]:
    """A command line as the rules read it, settled by its length and its checkpoint; and what its words say amiss.

    Args:
        here: where a path that it names is on this machine.

    Returns:
        The arguments, what is wrong, each in a sentence, and --load and --pretrained-checkpoint as they are here.
    """
    from megatron_lighthouse.mcore.command_line import causal, flags, hybrid, numbers, pyramid, scorer
    from megatron_lighthouse.mcore.command_line.entry import with_all_arguments

    args, wrong = flags.parse(words, with_all_arguments, strict=flags.installed() in (None, flags.VERSION))
    wrong += [] if args.use_checkpoint_args else hybrid.word_problems(args)  # of what is settled next
    args = settled(args)
    wrong += [*numbers.settle(args), *flags.apart(pyramid.budget_problems(args), args.malformed)]
    load, base = (here(path) if path else None for path in (args.load, args.pretrained_checkpoint))
    vars(args).update(pyramid.choice(args, load, base)[0])
    args.lighthouse_scorer, _ = scorer.choice(args, load, base)
    args.lighthouse_causal_selection, _ = causal.choice(args, load, base)
    return args, wrong, load, base


def is_known(options: argparse.Namespace) -> bool:
    """Whether it is known how many GPUs there are."""
    return None not in (options.nodes, options.gpus_per_node)


def world_of(args: argparse.Namespace, options: argparse.Namespace) -> int:
    """How many processes a run has: those of one sequence where it takes just these, or that is not known."""
    from megatron_lighthouse.launch.offered import one_sequence

    return one_sequence(args) if options.exact or not is_known(options) else int(options.nodes * options.gpus_per_node)


def machines(args: argparse.Namespace, options: argparse.Namespace) -> list[tuple[int, int]]:
    """Nodes, and GPUs of each, on which a run is judged: where these are not known, what is wrong on all of some is."""
    if is_known(options) and not options.exact:
        return [(options.nodes, options.gpus_per_node)]
    return [(1, world_of(args, options) * times) for times in ((1,) if options.exact else SOME)]


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Megatron's arguments and ours, by the list of its flags."""
    from megatron_lighthouse.mcore.command_line import flags
    from megatron_lighthouse.mcore.command_line.entry import with_all_arguments

    return settled(flags.parse(words, with_all_arguments, strict=False)[0])


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """With what Megatron makes of one argument by another, as far as the rules read it."""
    from megatron_lighthouse.mcore.command_line.layers import hybrid_pattern, is_latent, written_pattern

    args.seq_length = args.encoder_seq_length if args.seq_length is None else args.seq_length
    args.num_layers = args.encoder_num_layers if args.num_layers is None else args.num_layers
    if pattern := hybrid_pattern(args):
        args.num_layers, args.multi_latent_attention = len(pattern), is_latent(args)
        args.mtp_num_layers = args.mtp_num_layers or (written_pattern(args)[1] or "").count("/") or None
    args.rank = 0
    if not args.group_query_attention:  # then it is not read
        args.num_query_groups = None
    return args


def summary(args: argparse.Namespace, world: int) -> str:
    """What will run, in one line."""
    from megatron_lighthouse.mcore.command_line import documents
    from megatron_lighthouse.mcore.command_line.settings import settings_from
    from megatron_lighthouse.variants import VARIANTS

    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    pipeline = args.pipeline_model_parallel_size
    layout = f"TP {tensor} x CP {context} x PP {pipeline} x DP {world // (tensor * context * pipeline)}"
    line = f"{world} ranks = {layout}; {args.seq_length or "the checkpoint's"} tokens, {args.attention}"
    variant = VARIANTS[args.attention]
    if variant.selects and args.seq_length and not documents.asked(args):
        settings = settings_from(args)
        rows = variant.cost(settings.config, args.seq_length, context).gathered_length
        line += f", {rows} rows attended (L {settings.config.levels}, k {settings.config.budget})"
        if settings.edge:
            rows = variant.cost(settings.edge, args.seq_length, context).gathered_length
            line += f", {rows} in the first and last layers"
    return line


if __name__ == "__main__":
    sys.exit(main())
