"""`python -m experiments --runs dense norm-60 --work FOLDER --out FOLDER`: is the model at the end as good as dense?

Trains runs of an experiment, one after the other or, with --at-once, several side by side, by the product's own commands,
evaluates each checkpoint on held-out text, and measures what the switch cost. See docs/quality.md. --out gets a few small
tables, renewed every quarter of a minute; checkpoints and logs stay in --work. The same command again goes on where it was
cut off, and skips what is finished. Two such commands may run side by side, on different GPUs (CUDA_VISIBLE_DEVICES) with
different --runs, and the same --work and --out. Arguments that are not known here go to Megatron, in all runs.

    python -m experiments --draw RESULTS [RESULTS …]             pictures and a table of what is there, without a GPU
    python -m experiments --remake RESULTS --out NEW             all tables of it; with --draw NEW pictures too
    python -m experiments --merge RESULTS RESULTS … --out NEW    results of several machines in one folder

RESULTS is a folder of tables, a --work folder, a work.tgz, or a folder with no more than that.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir

from experiments import archive, pairs, tables
from experiments.bench import CUT_OFF, Bench, say
from experiments.run import REFERENCE
from experiments.runs import BASE, EXPERIMENTS


def _parser() -> argparse.ArgumentParser:
    experiments = "\n".join(
        f"  {name}: {experiment.title}\n" + "\n".join(f"      {run}: {what.title}" for run, what in experiment.runs.items())
        for name, experiment in EXPERIMENTS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        epilog=f"experiments and their runs:\n{experiments}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--experiment", choices=list(EXPERIMENTS), default="recipe", help="see below (default: %(default)s)")
    add("--runs", nargs="+", metavar="RUN", help="of the experiment (default: dense and the recipe; without it, all)")
    add("--out", type=Path, metavar="FOLDER", help="for the tables (default: experiments/results/EXPERIMENT)")
    add(
        "--work", type=Path, metavar="FOLDER", help="for checkpoints and logs (default: a temporary folder of the experiment's)"
    )
    add("--at-once", type=int, default=1, help="runs side by side, on all GPUs that are seen; their times say nothing")
    add("--within", type=int, metavar="SECONDS", help="save and end by then; the same command goes on")
    add("--steps", type=int, help="iterations of every run (default: the experiment's)")
    add("--seq-length", type=int, help="tokens of a sequence (default: the experiment's)")
    add("--batch", type=int, help="sequences an iteration (default: the experiment's)")
    add("--corpus", type=Path, metavar="FOLDER", help="one of recipe.corpus (default: made in --work)")
    add("--packages", nargs="+", metavar="NAME", help="of that corpus (default: recipe.corpus's)")
    add("--smooth", type=int, metavar="W", help="losses in a mean (default: a fortieth of --steps)")
    add("--loss-sequences", type=int, help="of the evaluation (default: 200; of 'wall' 100)")
    add("--passkey-samples", type=int, help="of the evaluation, a cell: a multiple of ten (default: 20; of a study 0)")
    add("--variables-samples", type=int, help="likewise of variable tracking (default: 20 of 'second' and 'large', else 0)")
    add("--hindsight-samples", type=int, default=500, help="of the checkpoint at the switch (default: %(default)s)")
    add("--remake", type=Path, metavar="RESULTS", help="write all tables again, in --out")
    add("--merge", nargs="+", type=Path, metavar="RESULTS", help="put results together in --out")
    add("--draw", nargs="+", type=Path, metavar="RESULTS", help="draw results, in --out or the first folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; answers an exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run under way ends too
    parser = _parser()
    options, more = parser.parse_known_args(argv)
    try:
        if options.remake or options.merge or options.draw:
            _tables(options)
            return 0
        options.out = options.out or Path(__file__).parent / "results" / options.experiment
        options.work = options.work or Path(gettempdir()) / f"quality-{options.experiment}"
        options.runs = [*dict.fromkeys(options.runs or _runs_of(options.experiment))]
        bench = Bench(options, more)
        bench.prepare()
        statuses = bench.all(options.runs)
        bench.publish(must=True)
    except ValueError as error:
        parser.error(str(error))
    cut_off = [name for name, status in statuses.items() if status == CUT_OFF]
    failed = [name for name, status in statuses.items() if status and name not in cut_off]
    if cut_off:
        say(f"not finished after {options.within} s: {', '.join(cut_off)}; the same command goes on")
    say(f"failed: {', '.join(failed)}" if failed else f"results: {options.out}")
    return 1 if failed else CUT_OFF if cut_off else 0


def _runs_of(experiment: str) -> list[str]:
    one = EXPERIMENTS[experiment]
    return [REFERENCE, BASE] if BASE in one.runs else [*one.runs]


def _tables(options: argparse.Namespace) -> None:
    """Write or draw what is there already.

    Raises:
        ValueError: no --out for what is written anew, or a folder without results.
    """
    if options.out is None and (options.remake or options.merge):
        raise ValueError(f"{'--remake' if options.remake else '--merge'} needs --out, a folder for the tables.")
    if options.remake:
        results = archive.read(options.remake)
    else:
        results = tables.merged(archive.read(path) for path in options.merge or options.draw)
    if options.remake or options.merge:
        pairs.write(results, options.out)
    if options.draw:
        from experiments import plots

        first = options.draw[0]
        plots.draw(results, options.out or (first.parent if first.is_file() else first))


if __name__ == "__main__":
    sys.exit(main())
