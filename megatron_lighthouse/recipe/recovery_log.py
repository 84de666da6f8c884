"""What the TensorBoard log of a run says of its losses, and of when its layers became dense. Ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lighthouse.recipe.comparable import check_switches, of_jobs, told
from megatron_lighthouse.recipe.of_run import log_folder
from megatron_lighthouse.recipe.whole_log import Losses

STAGES = ("lighthouse", "dense")
LAYERS = "lighthouse/layers"  # the scalar that `mcore.loop.switch` writes: layers that use Lighthouse
STAGE2_AT = "lighthouse_stage2_at"  # when the run's job switches
WARMUP = "lighthouse_dense_warmup_iters"  # up to when a job was dense
SIZES = ("seq_length", "global_batch_size")


@dataclass(frozen=True)
class Run:
    """What a log says."""

    losses: Losses
    switch: int
    """The last iteration before any layer became dense."""
    dense_from: int
    """The first logged one in which all are."""
    tokens: int | None
    """Tokens of an iteration, where the log has the run's arguments."""
    warmup: int = 0
    """The last iteration of a dense warm-up, as a job's arguments say, else as was logged; 0 without one.

    Of one by a job of its own nothing is known here: a dense job logs no Lighthouse layers.
    """


def read_losses(folders: Sequence[Path]) -> tuple[Losses, list[int], Losses]:
    """Of logs that follow each other: the losses, the first iteration of each log, and Lighthouse layers by iteration.

    Raises:
        ValueError: a folder without a log of training losses.
    """
    from megatron_lighthouse.plots import read_scalars

    losses: Losses = {}
    layers: Losses = {}
    starts = []
    for folder in folders:
        scalars = read_scalars(folder) if folder.is_dir() else {}
        if "lm loss" not in scalars:
            raise ValueError(f"{folder} has no TensorBoard log with training losses: give the folder of a run, or of its log.")
        steps, values = scalars["lm loss"]
        starts.append(int(steps[0]))
        losses, layers = ({i: x for i, x in known.items() if i < starts[-1]} for known in (losses, layers))
        losses |= {int(i): float(x) for i, x in zip(steps, values, strict=True)}
        layers |= {int(i): float(n) for i, n in zip(*scalars.get(LAYERS, ((), ())), strict=True)}
    return losses, starts, layers


def read_run(folder: Path, switch: int | None = None) -> Run:
    """A run and where it switched: as `switch` says, else the last job's argument, else the scalar of Lighthouse layers, of
    which not every iteration is logged, else between its two logs.

    Raises:
        ValueError: a log without losses, of a run that had none to switch, or one that does not say where the switch was.
    """
    folders = logs(folder)
    losses, starts, layers = read_losses(folders)
    layers = {i: n for i, n in layers.items() if i in losses}
    check_switches(folders, layers.values())
    said, full = arguments(folders[-1]), max(layers.values(), default=0)
    if switch is None:
        switch = said.get(STAGE2_AT)
    if switch is None and layers:
        switch = max(i for i, n in layers.items() if n == full)
    if switch is None and len(folders) > 1:
        switch = max((i for i in losses if i < starts[-1]), default=starts[-1] - 1)
    if switch is None:
        raise ValueError(f"the log in {folders[0]} does not say when layers became dense: add --switch ITER.")
    # where all use Lighthouse after --switch, stage 1 had trained on past the checkpoint that stage 2 took up
    dense_from = min((i for i in losses if i > switch and layers.get(i, 0) in (0, full)), default=switch + 1)
    named = [int(end) for part in folders for end in of_jobs(part, [WARMUP]).get(WARMUP, []) if end.isdigit()]
    warmup = named[-1] if named else max((i for i, n in layers.items() if i <= switch and n == 0 < full), default=0)
    tokens = math.prod(said[name] for name in SIZES) if said.keys() >= {*SIZES} else None
    return Run(losses, switch, dense_from, tokens, warmup)


def logs(folder: Path) -> list[Path]:
    """The folders of a run's log: one, or one a stage."""
    folder = log_folder(folder)
    base = folder / "tensorboard" if (folder / "tensorboard").is_dir() else folder
    stages = [part for part in base.iterdir() if [*part.glob("*tfevents*")]] if base.is_dir() else []
    return sorted(stages, key=lambda part: part.name != STAGES[0]) or [base]


def arguments(folder: Path) -> dict[str, int]:
    """`SIZES` and `STAGE2_AT`, where given, of the last job in a log: Megatron writes its arguments into it."""
    return {name: int(value) for name, value in told(folder, (*SIZES, STAGE2_AT)).items() if value.isdigit()}
