"""What `check` says of the memory of a GPU, as the plan counts it. Imports no Megatron."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_lighthouse.mcore.command_line.stage import SWITCHES
from megatron_lighthouse.mcore.data.blends import Here
from megatron_lighthouse.mcore.data.text import PADDED_VOCABULARY
from megatron_lighthouse.plan import memory
from megatron_lighthouse.plan.device import Device
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.search import ways
from megatron_lighthouse.plan.words import recompute_words, run_of_words

AGAIN = ("recompute", "mlp_tile_tokens")
REFUSED = 1.25
"""Memory over what a run may allocate above which it is refused: the count may be wrong by 10%, and no logits were measured."""


def counted(words: Sequence[str], args: argparse.Namespace, device: Device, world: int, here: Here) -> Run:
    """The run as the plan counts it, of its stages the one that needs more.

    Args:
        here: where a path of the words is on this machine.

    Raises:
        ValueError: why the plan does not count it.
    """
    run = run_of_words(words, device, world, here)
    dense_too = any(getattr(args, f"lighthouse_{name}") for name in SWITCHES)
    return max([run, run.change(attention=run.base.name)] if dense_too else [run], key=memory.total)


def needs(run: Run, named: bool) -> str:
    """The memory of a GPU, in words.

    Args:
        named: whether its vocabulary is known here, else a tokenizer says it when the run starts.
    """
    total, usable = memory.total(run), run.device.usable_bytes
    vocabulary = f"vocabulary {run.model.vocab:,}{'' if named else ', which is assumed'}"
    found = f"{total / 2**30:.1f} of {usable / 2**30:.1f} GiB by the plan ({run.device.name}, {vocabulary})"
    return found if total <= usable else f"{found}: IT MAY RUN OUT OF MEMORY"


def without_logits(run: Run) -> Run:
    """With as small a vocabulary as there is: no run is refused for what is only assumed."""
    return run.change(model=replace(run.model, vocab=PADDED_VOCABULARY))


def too_much(run: Run, named: bool = True) -> Iterator[str]:
    """Whether the run needs far more memory than a GPU has.

    Args:
        named: as `needs`; else its vocabulary is the smallest there is.
    """
    total, usable = memory.total(run), run.device.usable_bytes
    if total <= REFUSED * usable:
        return
    use = " or ".join(enough_memory(run)) or "more of --context-parallel-size and recompute together, or a shorter --seq-length"
    words = f"with a vocabulary of {run.model.vocab:,}"
    words = words if named else f"even {words}, for the tokenizer's is not known here"
    yield (
        f"--seq-length {run.seq_length} needs {total / 2**30:.1f} GiB of a GPU by the plan, {words}, and "
        f"{usable / 2**30:.1f} are there ({run.device.name}; where the nodes have others, --check 0 of submit.sh): use {use}."
    )


def enough_memory(run: Run) -> Iterator[str]:
    """Single changes with which it fits: what it recomputes, or as few more context- or tensor-parallel ranks as it takes."""
    tp, cp = run.tensor_parallel, run.context_parallel
    one = tp * cp * run.pipeline_parallel
    for tries in (
        [("no --cross-entropy-loss-fusion", {"loss_fusion": False})] if run.loss_fusion else [],
        [("no --loss-tile-tokens", {"loss_tile_tokens": None})] if run.loss_tile_tokens is not None else [],
        [(recompute_words(way), {name: getattr(way, name) for name in AGAIN}) for way in ways(run) if way.recompute != "none"],
        [(f"--context-parallel-size {cp * n}", {"context_parallel": cp * n}) for n in (2, 4, 8, 16, 32)],
        [(f"--tensor-model-parallel-size {tp * n} --sequence-parallel", {"tensor_parallel": tp * n}) for n in (2, 4, 8)],
    ):
        for text, change in tries:
            more = run.change(**change)
            if _fits(more):
                needed = one // (tp * cp) * more.tensor_parallel * more.context_parallel
                yield text if needed <= run.gpus else f"{text} on {needed} GPUs"
                break


def _fits(run: Run) -> bool:
    """On these GPUs, or on just those of one sequence where it takes more."""
    one = run.tensor_parallel * run.context_parallel * run.pipeline_parallel
    gpus = max(run.gpus, one)
    try:
        return memory.fits(run.change(gpus=gpus, global_batch=gpus // one).check())
    except ValueError:
        return False
