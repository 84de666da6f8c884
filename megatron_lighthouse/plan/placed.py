"""A batch and a layout for a run of which they are not given, or given in part; where none fits, what near it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_lighthouse.plan import lengths, memory
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.models import ALONE, check_model
from megatron_lighthouse.plan.report import layout
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.search import NOTHING, Held, Ranking, fitting, rank
from megatron_lighthouse.plan.stages import Stages
from megatron_lighthouse.plan.words import layout_words

FLAGS = {
    "tensor_parallel": "--tensor-model-parallel-size",
    "context_parallel": "--context-parallel-size",
    "pipeline_parallel": "--pipeline-model-parallel-size",
    "cp_comm_type": "--cp-comm-type",
    "recompute": "--recompute",
}
"""The parts of a layout that can be given, and the plan's flags of them."""
OTHERWISE = "a smaller model, or a device with more memory"
"""What is left where no change of the run will do."""


def batches(wanted: int, gpus: int) -> Iterator[int]:
    """Sequences a step that the GPUs can share, those nearest to `wanted` first (ours).

    Multiples of the GPUs, which are halved for as long as they are more than is wanted: 24 GPUs share 24 or 48 sequences, 96
    share 6. Then of twice as many, up to all GPUs, for layouts of fewer ranks to a sequence.
    """
    unit = gpus
    while unit > wanted and unit % 2 == 0:
        unit //= 2
    while unit <= gpus:
        yield max(1, round(wanted / unit)) * unit
        unit *= 2


def placed(run: Run, speed: Coefficients, fraction: float, held: Held = NOTHING, batch: int | None = None) -> Ranking:
    """The layouts of the run's GPUs that fit both its stages.

    Args:
        held: the parts of the layout that are given.
        batch: as it is given; None: that near the run's which the GPUs can share.

    Raises:
        ValueError: there is none; and what near this there is one for.
    """
    check_model(run)
    _check_held(run, held)
    tried = [*dict.fromkeys(batches(run.global_batch, run.gpus))] if batch is None else [batch]
    for size in tried:
        if (found := rank(run.change(global_batch=size), speed, fraction, held)).layouts:
            return found
    refused = ", ".join(f"{count} by {name}" for name, count in found.refused.most_common())
    given = "".join(f", {FLAGS[name]} {value}" for name, value in held.items())
    use = ", or ".join(text for text, _ in remedies(run, fraction, held, batch)) or OTHERWISE
    raise ValueError(
        f"--gpus {run.gpus}{given}: no layout fits both stages of {run.seq_length:,} tokens and "
        f"{' or '.join(map(str, tried))} sequences a step (refused: {refused}): use {use}."
    )


def near(run: Run) -> Run:
    """The run with the number of sequences a step nearest to its own that its data-parallel ranks can share."""
    ranks = run.data_parallel
    return run.change(global_batch=max(1, round(run.global_batch / ranks)) * ranks) if ranks else run


def does_not_fit(stages: Stages, ranking: Ranking) -> str:
    """That a stage needs more memory than a GPU has, and what fits: another of the layouts, else other changes."""
    run = stages.fullest
    where = f", of the {memory.stage_name(run)} pipeline stage" if run.pipeline_parallel > 1 else ""
    best = [layout_words(ranking.recommended[0])] if ranking.layouts else []
    use = best or [
        f"{text} with {layout_words(one)}" for text, one in remedies(stages.run, stages.fraction, NOTHING, run.global_batch)
    ]
    return (
        f"DOES NOT FIT: {run.variant.title} at {run.seq_length:,} tokens needs {memory.total(run) / 2**30:.1f} GiB of a GPU by "
        f"{layout(run)}{where}, and {run.device.usable_bytes / 2**30:.1f} are there ({run.device.name}): use "
        f"{', or '.join(use) or OTHERWISE}."
    )


def _check_held(run: Run, held: Held) -> None:
    """Raises ValueError, as `Run.check`, where what is given can be of no layout."""
    one = run.change(**{**ALONE, **held})
    ranks = one.tensor_parallel * one.context_parallel * one.pipeline_parallel
    one.change(global_batch=max(1, run.gpus // max(1, ranks))).check()


def remedies(run: Run, fraction: float, held: Held, batch: int | None) -> list[tuple[str, Run]]:
    """Single changes near what was asked with which a layout fits, and such a layout.

    A length of less than half is among them only where nothing else will do.
    """

    def first(one: Run, held: Held = held) -> Run | None:
        return _first(one, fraction, held, [batch] if batch else batches(one.global_batch, one.gpus))

    found: list[tuple[str, Run]] = []
    if batch and (one := _first(run, fraction, held, batches(batch, run.gpus))):
        found.append((f"--global-batch-size {one.global_batch}", one))
    for name, value in held.items():
        if one := first(run, {other: of for other, of in held.items() if other != name}):
            found.append((f"{FLAGS[name]} {getattr(one, name)} in place of {value}", one))
    power = run.gpus.bit_length()  # of two, above the GPUs
    if one := next(filter(None, (first(run.change(gpus=2**n)) for n in range(power, power + 4))), None):
        found.append((f"--gpus {one.gpus}", one))
    longest, least = lengths.of_gpus(run, fraction), run.seq_length / 2 if found else 0
    if longest and least <= longest.seq_length < run.seq_length and (one := first(lengths.at(run, longest.seq_length))):
        found.append((f"--seq-length {one.seq_length}", one))
    return found


def _first(run: Run, fraction: float, held: Held, sizes: Iterable[int]) -> Run | None:
    """Any layout that fits, with the first of these batches for which there is one."""
    found = (next(fitting(run.change(global_batch=size), fraction, held), None) for size in sizes)
    return next((stages.run for stages in found if stages), None)
