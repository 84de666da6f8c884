"""Progress bars: redrawn on a terminal; elsewhere, as in a log file, a line every so often."""

from __future__ import annotations

import sys
from typing import Any

SECONDS = 10.0
"""From one line to the next where there is no terminal."""


class Lines:
    """Where no terminal redraws a line, each state of the bar becomes a line of its own."""

    def __init__(self) -> None:
        self.last, self.stream = "", sys.stderr

    def write(self, text: str) -> None:
        done = text.strip().partition(" [")[0]  # but the time: drawn again where nothing was done since, or at the end
        if done and done != self.last:
            self.last = done
            self.stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self.stream.flush()


def bar(*given: Any, **named: Any) -> Any:
    """tqdm's, on stderr."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    apart = {} if terminal else {"mininterval": SECONDS, "maxinterval": SECONDS}
    where = {"file": sys.stderr if terminal else Lines(), "dynamic_ncols": terminal, "ncols": None if terminal else 110}
    return tqdm(*given, **{**apart, **where, **named})
