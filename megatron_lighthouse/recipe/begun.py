"""Whether a run's folder was begun with the data, steps and model that a command asks for. Imports no Megatron. Ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lighthouse.mcore.command_line import kept, stored
from megatron_lighthouse.recipe.comparable import from_where_they_differ
from megatron_lighthouse.variants import VARIANTS

MAY_CHANGE = """
    --attention --save --load --save-interval --exit-interval --eval-interval --eval-iters --log-interval --data-cache-path
    --lighthouse-selection-map --graphs --num-workers --distributed-backend --use-cpu-initialization --context-parallel-size
    --tensor-model-parallel-size --pipeline-model-parallel-size --sequence-parallel --cp-comm-type --bf16 --fp16
    --lr --min-lr --lr-decay-style --lr-warmup-fraction --lr-warmup-iters --weight-decay --clip-grad
""".split()
"""By flag: the run's own folders and intervals, its layout, which may change at any start, and what `check_resume` looks at."""
MAY_BEGIN = (
    "--log-",
    "--tensorboard-",
    "--wandb-",
    *(f"--{name}-telemetry-" for name in VARIANTS),
    "--recompute-",
    "--no-",
    "--override-",
    "--dist-",
    "--cuda-graph-",
)
"""How a flag may begin that changes neither data nor steps nor model."""


def check_begun(run: Path, commands: Mapping[str, Sequence[str]], steps: tuple[int, int]) -> None:
    """Refuse to go on with a run that was begun otherwise.

    Args:
        run: the run's folder; nothing is compared where it has no checkpoint.
        commands: Megatron's arguments of each stage as they are asked for, in order, by its attention.
        steps: iterations of the two stages, as asked for.

    Raises:
        ValueError: every argument that differs, with both values.
    """
    iteration = stored.last_iteration(run / "checkpoints")
    if not iteration:
        return
    lines: list[str] = []
    logs = {attention: run / "tensorboard" / attention for attention in commands}
    left = {attention: kept.read(log) for attention, log in logs.items() if (log / kept.NAME).is_file()}
    for attention, before in left.items():
        lines += _words(commands[attention], before)
    # a run of one stage that has gone on since left the arguments of that job, not those that it was begun with
    went_on = len(commands) == 1 and iteration >= sum(steps)
    if left and not went_on:
        lines += _steps(next(iter(left.values())), steps)
    if not left:
        state = stored.common_state(run / "checkpoints", iteration)
        lines += _stored([*commands.values()][-1], (state or {}).get("args"))
    if lines := [*dict.fromkeys(lines)]:
        raise ValueError(f"{run} was begun otherwise: give what it was, or another --name.\n  - " + "\n  - ".join(lines))


def _compared(flag: str) -> bool:
    return flag not in (*MAY_CHANGE, "--train-iters") and not flag.startswith(MAY_BEGIN)


def _words(asked: Sequence[str], before: Sequence[str]) -> Iterator[str]:
    """Of a stage that left its arguments: flags of either."""
    now, then = (dict(kept.options(words)) for words in (asked, before))
    for flag in {**now, **then}:
        if _compared(flag) and now.get(flag) != then.get(flag):
            asked, there = from_where_they_differ(now.get(flag) or [], then.get(flag) or [])
            yield f"{flag} {asked or _absent(flag, now)}, there {there or _absent(flag, then)}"


def _steps(before: Sequence[str], steps: tuple[int, int]) -> Iterator[str]:
    """Of the first stage, which ended where the second began."""
    total, first = (kept.value(before, flag) for flag in ("--train-iters", "--exit-interval"))
    if not total or not first:
        return
    for flag, asked, there in (("--steps", steps[0], int(first)), ("--dense-steps", steps[1], int(total) - int(first))):
        if asked != there:
            yield f"{flag} {asked}, there {there}"


def _stored(asked: Sequence[str], args: Any) -> Iterator[str]:
    """Of a run that an earlier version began: what its checkpoint says of the flags that are given now."""
    for flag, values in kept.options(asked):
        there = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
        known = [str(x) for x in there] if isinstance(there, list) else [str(there)]
        if not values or there is None or (not _compared(flag) and flag != "--train-iters"):
            continue
        if [*map(_number, values)] != [*map(_number, known)]:
            yield "{} {}, there {}".format(flag, *from_where_they_differ(values, known))


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def _absent(flag: str, words: Mapping[str, Sequence[str]]) -> str:
    """Of a flag without values."""
    return "given" if flag in words else "not given"
