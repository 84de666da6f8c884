"""`python -m megatron_lighthouse.plan`: days, GPU-hours and layout of a run before it is queued.

    python -m megatron_lighthouse.plan --model llama3-8b --tokens 20B --seq-length 512K --gpus 64 --device b200

`… plan models` is the table of docs/models.md, `… plan scaling RESULTS…` collects what runs took. Start from a model, whose
layout is found, or from a recipe and its layout, and change what differs; every number has the flag that Megatron knows it by.
`--list` shows models and recipes, `--errors` every point that the times were fitted to. No GPU is needed.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.lighthouse.by_length import NAMES
from megatron_lighthouse.lighthouse.config import AUTO, flag
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.mcore.command_line import graphs, scorer
from megatron_lighthouse.options import in_flags
from megatron_lighthouse.plan import gains, longest, memory, numbers, report, scaling, search
from megatron_lighthouse.plan.answer import answer
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES, device_of
from megatron_lighthouse.plan.documents import FLAG, Mix
from megatron_lighthouse.plan.model import FLAGS, UNTIED
from megatron_lighthouse.plan.models import models, run_of_model
from megatron_lighthouse.plan.placed import FLAGS as LAYOUT
from megatron_lighthouse.plan.placed import does_not_fit, near, placed
from megatron_lighthouse.plan.run import RECOMPUTE, Run, check_names, recipes, run_of
from megatron_lighthouse.plan.stages import FRACTION, Stages
from megatron_lighthouse.plan.words import assumes_rows, recipe_words, run_of_words
from megatron_lighthouse.usage import Parser
from megatron_lighthouse.variants import LIGHTHOUSE, counted

RUN_FLAGS = {
    "seq_length": "--seq-length",
    "gpus": "--gpus",
    **{name: one for name, one in LAYOUT.items() if name.endswith("parallel")},
    "global_batch": "--global-batch-size",
    "edge_budget": "--lighthouse-edge-budget",
}
GRAPHS = "--cuda-graph-impl"
BF16_GRADIENTS = "--grad-reduce-in-bf16"
NOT_OF_LONGEST = {name: f"--{name.replace('_', '-')}" for name in ("tokens", "stage1_fraction", "seq_length", "details")}
NOT_OF_LONGEST |= {"global_batch": "--global-batch-size", "document_lengths": FLAG}
"""What means nothing beside --longest."""
CONFIG_FLAGS = {name: flag(name) for name in ("levels", "pooling", "budget", "tile_budget")}
RECIPE = "530m-98k"
TOKENS = 10e9
LENGTH = 2**17
"""Tokens of a sequence of a model where nothing is said."""


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="python -m megatron_lighthouse.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.usage = "%(prog)s [--model NAME | --recipe NAME] [--tokens N] [--seq-length N] [--gpus N] [--device NAME] … (--help)"
    made.add_argument("--model", help=f"a model by name: {', '.join(models())}; its layout is found where none is given")
    made.add_argument("--recipe", help=f"or a recipe: a name, or a file of launch/recipes; default: {RECIPE}")
    made.add_argument("--tokens", type=numbers.tokens, metavar="N", help="to train on, as 20B; default: 10B")
    made.add_argument("--device", default="b200", help=f"{', '.join(DEVICES)}; default: %(default)s")
    made.add_argument(
        "--stage1-fraction",
        type=float,
        metavar="X",
        help=f"share of the tokens in stage 1 (Lighthouse), before the dense stage 2; default: {FRACTION}",
    )
    made.add_argument(
        FLAG, type=Path, metavar="FILE", help="rows are packed: a document's tokens a line, or these and how many have so many"
    )
    made.add_argument("--details", action="store_true", help="after the answer: each part, all layouts, what it is worth")
    made.add_argument("--attention", help=f"{' or '.join(counted())}; default: the file's, else {LIGHTHOUSE.name}")
    made.add_argument("--recompute", help=f"{', '.join(RECOMPUTE)}")
    made.add_argument("--cp-comm-type", help=f"{', '.join(COMM_TYPES)}")
    made.add_argument(flag("scorer"), dest="scorer", help=f"{', '.join((AUTO, *SCORERS))}")
    made.add_argument(GRAPHS, choices=["none", *graphs.KINDS], help="under CUDA graphs, as Megatron's")
    made.add_argument("--qk-layernorm", action="store_true", help="the model norms queries and keys")
    made.add_argument("--cross-entropy-loss-fusion", dest="loss_fusion", action="store_true", help="as Megatron's")
    made.add_argument(BF16_GRADIENTS, dest="gradient_bytes", action="store_const", const=2, help="as Megatron's")
    made.add_argument(UNTIED, dest="untied", action="store_true", help="as Megatron's; default: as the model or recipe has it")
    for flags in (FLAGS, RUN_FLAGS, CONFIG_FLAGS):
        for name, one in flags.items():
            kind = numbers.length if name == "seq_length" else int
            made.add_argument(one, dest=name, type=kind, metavar="N", help="instead of the recipe's")
    made.add_argument("--nodes", "--nnodes", "--num-nodes", dest="nodes", type=int, help=argparse.SUPPRESS)
    made.add_argument("--longest", action="store_true", help="the longest context that these GPUs train, and stop")
    made.add_argument("--list", action="store_true", help="show models and recipes, and stop")
    made.add_argument("--errors", action="store_true", help="show the model beside every measured point and stop")
    return made


def run_from(options: argparse.Namespace) -> Run:
    """The model's or the recipe's run with what was asked for instead. Raises ValueError where it cannot be."""
    given = {name: value for name, value in vars(options).items() if value is not None and value is not False}
    if given.get("scorer") == AUTO:
        del given["scorer"]
    names = (*RUN_FLAGS, "attention", "recompute", "cp_comm_type", "loss_fusion", "gradient_bytes")
    changes = {name: given[name] for name in names if name in given}
    lighthouse = {name: given[name] for name in (*CONFIG_FLAGS, "scorer") if name in given}
    for flags in (FLAGS, RUN_FLAGS, CONFIG_FLAGS):
        for name, one in flags.items():
            least = 0 if name in ("dense_first", "dense_last") else 1
            if (value := given.get(name)) is not None and value < least:
                raise ValueError(f"{one} {value} must be at least {least}: use {least} or more.")
    device = device_of(options.device)
    if (nodes := options.nodes) is not None:
        use = f"--gpus {max(1, nodes) * device.node}"
        raise ValueError(f"--nodes {nodes}: the plan counts GPUs, {device.node} to a node of {device.name}: use {use}.")
    check_names(options.attention, options.recompute, options.cp_comm_type)  # before they are read as words of a file
    recipe = options.recipe or RECIPE
    if options.model and options.recipe:
        raise ValueError(f"--model {options.model} and --recipe {options.recipe} are both where to start from: give one.")
    if options.model:
        run = run_of_model(options.model, **{"seq_length": LENGTH, "gpus": 8, **changes}, device=device, lighthouse=lighthouse)
    elif recipe in recipes() or not (recipe.endswith(".args") or Path(recipe).is_file()):
        run = run_of(recipe, device=device, lighthouse=lighthouse, **changes)
        run = run if "global_batch" in given else near(run)
    else:  # what is given comes last, where it wins and sizes that follow from it do so
        flags = {**RUN_FLAGS, **CONFIG_FLAGS, "scorer": flag("scorer"), "attention": "--attention"}
        flags |= {"cp_comm_type": "--cp-comm-type"}
        own = [word for name, one in flags.items() if name in given and name != "gpus" for word in (one, str(given[name]))]
        words = [*recipe_words(Path(recipe)), *own]
        run = run_of_words(words, device, options.gpus)
        if assumes_rows(words) and "vocab" not in given:
            print(f"{recipe}: the vocabulary is assumed: {run.model.vocab:,}. --vocab-size sets another.", file=sys.stderr)
        run = run.change(**{name: given[name] for name in ("recompute", "loss_fusion", "gradient_bytes") if name in given})
    if options.document_lengths:
        run = run.change(documents=Mix.read(options.document_lengths))
    if options.cuda_graph_impl:
        run = run.change(options={**run.options, "cuda_graph_impl": options.cuda_graph_impl})
    if options.qk_layernorm:
        run = run.change(options={**run.options, "qk_layernorm": True})
        if run.variant.selects and "scorer" not in given and SCORERS[run.config.scorer].by_length:
            run = run.change(config=run.config.replace(scorer=scorer.of_model(options)))
    sizes = {name: given[name] for name in FLAGS if name in given} | ({"tied": False} if options.untied else {})
    return run.change(model=replace(run.model, **sizes))


def chose_batch(options: argparse.Namespace, run: Run) -> bool:
    """Whether the sequences of a step are the plan's choice, neither given nor the recipe's."""
    own = recipes().get(options.recipe or RECIPE, {}).get("global_batch", run.global_batch)
    return options.global_batch is None and (options.model is not None or run.global_batch != own)


def plan(options: argparse.Namespace) -> str:
    """The answer, and the details where they are asked for. Raises ValueError where there is none."""
    tokens = TOKENS if options.tokens is None else options.tokens
    if not 0 < tokens < math.inf:
        raise ValueError(f"--tokens {tokens:g} must be above 0, and finite: use 20B or 10e9.")
    values = {one: getattr(options, name) for name, one in NOT_OF_LONGEST.items()}
    if options.longest and (beside := [one for one, value in values.items() if value is not None and value is not False]):
        raise ValueError(
            f"--longest tells how far one sequence a step reaches in one stage, whatever {' '.join(beside)} would say: leave "
            f"{' '.join(beside)} out, or --longest."
        )
    run, speed = run_from(options), coefficients()
    fraction = FRACTION if options.stage1_fraction is None else options.stage1_fraction
    name = options.model or (options.recipe or RECIPE).removesuffix(".args").rpartition("/")[2]
    held = {field: value for field in LAYOUT if (value := getattr(options, field)) is not None}
    if options.longest:
        if not (found := [*longest.layouts(run, held)]):
            asked = " ".join(f"{LAYOUT[field]} {value}" for field, value in held.items())
            raise ValueError(f"--gpus {run.gpus}: no layout that shares one sequence among them has {asked}: leave that out.")
        own = [field for field in NAMES if getattr(options, field) is not None]
        return longest.answer(name, run, found, own, speed)
    if options.model:
        ranking = placed(run, speed, fraction, held, options.global_batch)
        run = ranking.recommended[0]
    else:
        run.check()
        ranking = search.rank(run, speed, fraction)
    if tokens < (step := run.global_batch * run.seq_length):
        raise ValueError(f"--tokens {tokens:g} are fewer than the {step:,} of one step: give more, such as 20B.")
    stages = Stages(run, fraction).check()
    details = [report.whole(stages, ranking, speed)] if options.details else []
    if not memory.fits(stages.fullest):
        raise ValueError("\n\n".join([does_not_fit(stages, ranking), *details]))
    return "\n\n".join([answer(name, stages, ranking, tokens, speed, chose_batch(options, run)), *details])


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["scaling"]:
        return scaling_main(arguments[1:])
    if arguments[:1] == ["models"]:
        if more := " ".join(arguments[1:]):
            print(
                f"plan models takes nothing, and {more} was given: ask for one model, by --model NAME {more}.", file=sys.stderr
            )
            return 2
        print(gains.table(coefficients()))
        return 0
    options = parser().parse_args(arguments)
    try:
        if options.list:
            print(report.table(["model", "what"], [(name, table["title"]) for name, table in models().items()]))
            print("\n" + report.table(["recipe", "what"], [(name, table["description"]) for name, table in recipes().items()]))
        elif options.errors:
            print(report.errors(coefficients(), every=True))
        else:
            print(plan(options))
    except ValueError as error:
        print(in_flags(str(error)), file=sys.stderr)
        return 2
    return 0


def scaling_main(arguments: Sequence[str]) -> int:
    made = Parser(prog="python -m megatron_lighthouse.plan scaling", description=scaling.__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("results", nargs="+", type=Path, help="folders of runs, or folders that hold such folders")
    made.add_argument("--out", type=Path, default=Path("scaling"), help="where CSV, table and plots go; default: %(default)s")
    options = made.parse_args(arguments)
    try:
        print(scaling.collect(options.results, options.out))
    except OSError as error:  # of --out alone: a run that cannot be read has a note
        print(
            f"--out {options.out} cannot be written ({error.strerror}): name a folder, or one that can be made.",
            file=sys.stderr,
        )
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends as other tools do where `head` reads no more
    sys.exit(main())
