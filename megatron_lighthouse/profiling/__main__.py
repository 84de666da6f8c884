"""`python -m megatron_lighthouse.profiling report TRACE...`: where the time of a profiled run goes, by step.

TRACE is a trace of torch.profiler (.json, .json.gz) or of Nsight Systems (.sqlite, or .nsys-rep where nsys is on PATH), one
or several ranks of one run. No GPU is needed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lighthouse.profiling import report
from megatron_lighthouse.usage import Parser


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="python -m megatron_lighthouse.profiling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = made.add_subparsers(required=True, metavar="report").add_parser("report", help="the table, and files of it")
    what.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="a file for each rank, or one that holds several")
    what.add_argument("--iterations", type=int, metavar="N", help="training iterations in the profile, where it marks none")
    what.add_argument("--csv", type=Path, metavar="FILE", help="write every number, a line each")
    what.add_argument("--png", type=Path, metavar="FILE", help="draw a stacked bar for each rank")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        for flag, path in (("--csv", options.csv), ("--png", options.png)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{flag} {path} is in a folder that is not there: make {path.parent}, or choose another.")
        found = report.ranks(options.traces, options.iterations)
        if options.csv is not None:
            report.write_csv(found, options.csv)
        if options.png is not None:
            from megatron_lighthouse.profiling.picture import draw

            draw(found, options.png)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report.text(found))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends as other tools do where `head` reads no more
    sys.exit(main())
