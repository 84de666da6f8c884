"""A run's folder in place of its arguments: for an evaluation of its checkpoints, and for its log. Imports no Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lighthouse.mcore.command_line import kept

LAYOUT = """
    --tensor-model-parallel-size --context-parallel-size --pipeline-model-parallel-size --expert-model-parallel-size
    --expert-tensor-parallel-size --sequence-parallel --num-layers-per-virtual-pipeline-stage
    --num-virtual-stages-per-pipeline-rank --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers
    --pipeline-model-parallel-layout --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
    --cp-comm-type --hierarchical-context-parallel-sizes --tp-comm-overlap --overlap-p2p-communication-warmup-flush
""".split()
"""How a run was spread over ranks: an evaluation reads whole sequences by as many ranks as it has."""


def of_one_sequence(given: Sequence[str]) -> list[str]:
    """A command line of an evaluation, with the arguments of `--run-folder` before its own, less those of the run's layout.

    Raises:
        ValueError: as `kept.of_run`.
    """
    before, own = kept.of_run(given)
    if not before:
        return own
    save = kept.value(before, "--save")
    stays = kept.words((flag, values) for flag, values in kept.options(before) if flag not in (*LAYOUT, *kept.ONCE))
    return [*stays, *(["--load", save] if save else []), *own]


def log_folder(folder: Path) -> Path:
    """Where the TensorBoard log of the run in `folder` is: there, or where its arguments say."""
    if (folder / "tensorboard").is_dir() or [*folder.glob("*tfevents*")]:
        return folder
    try:
        named = kept.value(kept.read(folder), "--tensorboard-dir")
    except ValueError:
        return folder
    return Path(named) if named else folder
