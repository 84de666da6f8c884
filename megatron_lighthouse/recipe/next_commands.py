"""What `two_stage` ends with: commands to paste, for what the run has left. Imports no Megatron. Ours."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lighthouse.mcore.command_line import kept


def told(run: Path, arguments: Sequence[str], start: Sequence[str], done: int, more: int, switches: bool) -> str:
    """The run's evaluation, its recovery where it `switches`, and `more` iterations.

    Args:
        run: its folder.
        arguments: Megatron's, of its last stage.
        start: what starts the run's processes, to be followed by a module's name.
        done: its iterations, which may be more than it was begun for.
    """
    module, folder = [sys.executable, "-m"], [kept.RUN, str(run)]
    total = str(max(int(kept.value(arguments, "--train-iters") or 0), done) + more)
    sequence, kept_back = int(kept.value(arguments, "--seq-length") or 0), _held_out(run)
    held_out, why = [], ""
    if kept_back <= sequence:
        held_out = ["--held-out", "YOUR_TEXT"]
        why = f" (YOUR_TEXT is any it has not read: it held out {kept_back:,} tokens, less than a sequence of {sequence:,})"
    further = ["--train-iters", total, "--exit-interval", total, "--override-opt-param-scheduler"]
    evaluation = [*module, "megatron_lighthouse.recipe.evaluate", *folder, *held_out, "--out", str(run / "evaluation")]
    recovery = [*module, "megatron_lighthouse.recipe.recovery", *folder]
    commands = {
        f"what it has learnt of long text{why}; on a CPU this takes minutes, and less with --passkey-samples 5": evaluation,
        **({"what the switch cost": recovery} if switches else {}),
        f"{more} iterations more": [*start, "-m", "megatron_lighthouse.pretrain_gpt", *folder, *further],
    }
    return "\n".join(["Next:", *(f"# {title}\n{shlex.join(words)}" for title, words in commands.items())])


def _held_out(run: Path) -> int:
    """Tokens of the text that no stage was trained on."""
    return max((path.stat().st_size // 2 for path in (run / "data").glob("text-*-valid.bin")), default=0)
