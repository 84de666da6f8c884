"""Which errors end a run with the status of a refusal, after which a job is not queued again. Imports no Megatron."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
import traceback

from megatron_lighthouse.mcore.command_line import flags

REFUSED = 2
"""Exit status of a command line or data that cannot run, as argparse's: pretrain.sbatch does not queue such a job again."""
LASTING = (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
"""Those errors of files that the next start meets too."""
STATED = (AssertionError, ValueError, NotImplementedError, RuntimeError)
"""As which Megatron, and Lighthouse, state their rules."""

HEADER = "The run cannot start as asked:"
WAIT = 5.0
"""Seconds in which the first rank says why a run is refused, and its launcher ends the others."""

OTHER_SHAPES = "Global shape mismatch for loaded"
"""How Megatron begins to say that a checkpoint is another model's; torch passes it on in a class of its own."""


class RefusedError(ValueError):
    """Every start of the run would end so."""


def repeats(error: BaseException, parsed: bool) -> bool:
    """Whether another start of the same command line would end the same way.

    While arguments are parsed, whatever is no matter of the machine: of files that are being written, a disk, a network, a GPU.
    Once they are parsed, only what Megatron or Lighthouse states, in code of its own.
    """
    if isinstance(error, RefusedError):
        return True
    if isinstance(error, (json.JSONDecodeError, UnicodeError, MemoryError)):  # a file that is read while it is written
        return False
    if parsed:
        cause = error.__cause__ if type(error) is Exception else None  # Megatron's, where it cannot write a cache
        stated = type(error) in STATED and _raised_in(error, "megatron", "megatron_lighthouse")
        stated = stated or OTHER_SHAPES in str(error)
        return stated or (isinstance(cause, OSError) and cause.errno in LASTING)
    if isinstance(error, OSError):
        return error.errno in LASTING
    if isinstance(error, RuntimeError):  # torch's: a GPU that does not start, half a checkpoint
        import torch

        return not (isinstance(error, torch.AcceleratorError) or _raised_in(error, "torch"))
    return True


def bare_assertion(error: BaseException) -> str | None:
    """What an assertion without words asserts, and where; None of another error."""
    if not isinstance(error, AssertionError) or str(error):
        return None
    where = traceback.extract_tb(error.__traceback__)[-1:]
    return f"Megatron refuses the arguments: {where[0].line} ({where[0].filename}, line {where[0].lineno})." if where else None


def sentences(error: BaseException) -> list[str]:
    """What an error says, a line of ours each; of a bare assertion, what it asserts."""
    if rule := bare_assertion(error):
        return [rule]
    text = flags.in_flags(str(error)) or type(error).__name__
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if not line.endswith("as asked:")]
    return [f"Megatron: {lines[0]}", *lines[1:]] if isinstance(error, AssertionError) else lines


def say(error: BaseException) -> None:
    """What a refused run prints, once: the first rank all of it, and no trace of what is stated.

    Another rank waits, for the first one's end is its own. Where it alone is refused, as by a file that its node has not, it
    says one line.
    """
    found, rank = sentences(error), os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(WAIT)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        print(f"rank {rank} on {socket.gethostname()}: refused: {found[0]}{more}", file=sys.stderr, flush=True)
        return
    if not (type(error) in STATED and _raised_in(error, "megatron", "megatron_lighthouse")):
        traceback.print_exception(error)
    text = "".join(f"\n  - {sentence}" for sentence in found) if len(found) > 1 else f" {found[0]}"
    print(HEADER + text, file=sys.stderr, flush=True)


def _raised_in(error: BaseException, *packages: str) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in packages
