"""`python -m megatron_lighthouse.plan`: memory, time and cost of a run before it is queued; `… plan scaling RESULTS…` after.

Start from a recipe (--recipe) and change what differs; every number has the flag that Megatron knows it by. `--list` shows
the recipes, `--errors` every point that the model was fitted to. No GPU is needed.
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
from megatron_lighthouse.options import in_flags
from megatron_lighthouse.plan import report, scaling
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES, device_of
from megatron_lighthouse.plan.model import FLAGS
from megatron_lighthouse.plan.run import RECOMPUTE, Run, check_names, recipes, run_of
from megatron_lighthouse.plan.words import recipe_words, run_of_words
from megatron_lighthouse.variants import LIGHTHOUSE, counted

RUN_FLAGS = {
    "seq_length": "--seq-length",
    "gpus": "--gpus",
    "tensor_parallel": "--tensor-model-parallel-size",
    "context_parallel": "--context-parallel-size",
    "pipeline_parallel": "--pipeline-model-parallel-size",
    "global_batch": "--global-batch-size",
    "edge_budget": "--lighthouse-edge-budget",
}
CONFIG_FLAGS = {name: f"--lighthouse-{name.replace('_', '-')}" for name in ("levels", "pooling", "budget", "tile_budget")}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m megatron_lighthouse.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--recipe", default="530m-98k", help="where to start from: a name, or a file of launch/recipes; default: %(default)s"
    )
    made.add_argument("--device", default="b200", help=f"{', '.join(DEVICES)}; default: %(default)s")
    made.add_argument("--attention", help=f"{' or '.join(counted())}; default: the file's, else {LIGHTHOUSE.name}")
    made.add_argument("--tokens", type=float, default=10e9, help="token budget, for GPU-hours; default: 10 billion")
    made.add_argument("--recompute", help=f"{', '.join(RECOMPUTE)}")
    made.add_argument("--cp-comm-type", help=f"{', '.join(COMM_TYPES)}")
    for flags in (FLAGS, RUN_FLAGS, CONFIG_FLAGS):
        for name, flag in flags.items():
            made.add_argument(flag, dest=name, type=int, metavar="N", help="instead of the recipe's")
    made.add_argument("--list", action="store_true", help="show the recipes and stop")
    made.add_argument("--errors", action="store_true", help="show the model beside every measured point and stop")
    return made


def run_from(options: argparse.Namespace) -> Run:
    """The recipe's run with what was asked for instead. Raises ValueError where it cannot be."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    changes = {name: given[name] for name in (*RUN_FLAGS, "attention", "recompute", "cp_comm_type") if name in given}
    device = device_of(options.device)
    check_names(options.attention, options.recompute, options.cp_comm_type)  # before they are read as words of a file
    if options.recipe in recipes() or not (options.recipe.endswith(".args") or Path(options.recipe).is_file()):
        run = run_of(options.recipe, device=device, **changes)
    else:  # what is given comes last, where it wins and sizes that follow from it do so
        flags = {**RUN_FLAGS, "attention": "--attention", "cp_comm_type": "--cp-comm-type"}
        own = [word for name, flag in flags.items() if name in given for word in (flag, str(given[name]))]
        run = run_of_words([*recipe_words(Path(options.recipe)), *own], device, options.gpus)
        run = run.change(recompute=options.recompute or run.recompute)
    model = replace(run.model, **{name: given[name] for name in FLAGS if name in given})
    config = run.config.replace(**{name: given[name] for name in CONFIG_FLAGS if name in given})
    return run.change(model=model, config=config).check()


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["scaling"]:
        return scaling_main(arguments[1:])
    options = parser().parse_args(arguments)
    try:
        if options.list:
            print(report.table(["recipe", "what"], [(name, table["description"]) for name, table in recipes().items()]))
        elif options.errors:
            print(report.errors(coefficients(), every=True))
        else:
            if not 0 < options.tokens < math.inf:
                raise ValueError(f"--tokens {options.tokens:g} must be above 0, and finite: use 1e9 for a billion.")
            print(report.whole(run_from(options), coefficients(), options.tokens))
    except ValueError as error:
        print(in_flags(str(error)), file=sys.stderr)
        return 2
    return 0


def scaling_main(arguments: Sequence[str]) -> int:
    made = argparse.ArgumentParser(prog="python -m megatron_lighthouse.plan scaling", description=scaling.__doc__)
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
