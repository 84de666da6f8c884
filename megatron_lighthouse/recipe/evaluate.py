"""`python -m megatron_lighthouse.recipe.evaluate`: what a checkpoint has learnt of long text.

Takes `--run-folder`, or the arguments of the run of `megatron_lighthouse.pretrain_gpt` with `--load` its checkpoints; and
`--held-out TEXT --out FOLDER`. Its measurements are of the same text and questions for every checkpoint: the loss by position
in the sequence; two retrieval probes, passkey and variable tracking; and hindsight, what the loss owes to later tokens. Text is
read by the run's tokenizer. Dense unless `--attention lighthouse` is given, by the run or here. One process, or torchrun: its
ranks share out the samples.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

import megatron_lighthouse
from megatron_lighthouse.launch.torchrun import ALONE
from megatron_lighthouse.mcore.command_line import kept
from megatron_lighthouse.mcore.command_line.documents import FLAG, asked
from megatron_lighthouse.mcore.data import text
from megatron_lighthouse.mcore.refusal import REFUSED, repeats
from megatron_lighthouse.needed import ask_for_megatron
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.quiet import quiet_imports
from megatron_lighthouse.recipe import evaluation_files, held_out_loss, hindsight, positions, probes
from megatron_lighthouse.recipe.readers import Reader
from megatron_lighthouse.recipe.refused import Refused
from megatron_lighthouse.recipe.which_attention import selecting, trained_with
from megatron_lighthouse.usage import Parser
from megatron_lighthouse.variants import VARIANTS

if TYPE_CHECKING:
    from megatron_lighthouse.recipe.probe import Grid
    from megatron_lighthouse.recipe.trained import Trained

type Array = numpy.ndarray[Any, Any]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what an evaluation asks for to Megatron's parser."""
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--held-out", nargs="+", metavar="PATH", help="Text that was not trained on. Default: what --text-data held out.")
    add("--out", type=Path, metavar="FOLDER", required=True, help="Where the results go.")
    add("--loss-sequences", type=int, default=64, help="Sequences of --seq-length, at most; 0 for no loss. Default: 64.")
    add("--loss-grid", choices=positions.GRIDS, default="log2", help="How positions are put into buckets. Default: log2.")
    add("--loss-buckets", type=int, default=16, help="Buckets of --loss-grid equal. Default: 16.")
    probes.add_arguments(group)
    add("--hindsight-samples", type=int, default=0, help="Sequences with another future; 0 for no hindsight. Default: 0.")
    add("--hindsight-seed", type=int, default=1234, help="Of the samples. Default: 1234.")
    return parser


def _parser() -> Parser:
    """What --help shows."""
    made = Parser(
        prog="python -m megatron_lighthouse.recipe.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Beside these, the arguments of python -m megatron_lighthouse.pretrain_gpt.",
    )
    made.add_argument(kept.RUN, metavar="FOLDER", help="Take the arguments of the last job there, and its checkpoint.")
    add_arguments(made)
    return made


def held_out(args: argparse.Namespace, reader: Reader) -> tuple[list[Path], Array]:
    """The files of --held-out, and their tokens; without it, none, and the tokens of --text-data that the run did not train on.

    Raises:
        ValueError: neither, a path that does not exist, or no text.
    """
    if args.held_out:
        return reader.read(args.held_out)
    if not args.text_data:
        raise ValueError("--held-out PATH is missing: name text that the run did not train on.")
    folder = args.data_cache_path or os.path.join(args.load or "", "data")
    _, valid = text.names_of(text.text_files(args.text_data), folder)
    if not os.path.exists(f"{valid}.idx"):
        raise ValueError(
            f"--held-out PATH is missing, and {folder} no longer holds what the run held out of --text-data, or the text has "
            "changed since: name text that the run did not train on."
        )
    return [], numpy.fromfile(f"{valid}.bin", dtype=numpy.uint16)


def hindsight_problems(args: argparse.Namespace, tokens: int, iteration: int | None) -> Iterator[str]:
    """Why hindsight cannot be measured on `tokens` tokens, or of layers that were dense in `iteration`, where that is known."""
    yield from hindsight.problems(tokens, args.seq_length, args.hindsight_samples, args.hindsight_seed)
    if asked(args):
        yield (
            f"--hindsight-samples {args.hindsight_samples} puts other text after a position, which with {FLAG} would end its "
            "document elsewhere, and the budget goes by that length: use --hindsight-samples 0."
        )
    if iteration is None:
        return
    trained = trained_with(args, iteration) if VARIANTS[args.attention].selects else None
    if args.dense_by is not None or (trained and not VARIANTS[trained].selects):
        why = args.dense_by if trained is None else "as they were trained"
        steps = " or ".join(map(str, selecting(args)[-3:]))
        yield (
            f"--hindsight-samples {args.hindsight_samples} asks what Lighthouse layers owe to later tokens, and in iteration "
            f"{iteration} of --load {args.load} all are dense ({why}): "
            f"{f'give --ckpt-step {steps}' if steps else 'name a checkpoint of stage 1'}, or --hindsight-samples 0."
        )


def hindsight_by_distance(trained: Trained, tokens: Array) -> dict[str, Any]:
    """The loss with the true later tokens and with others, at a position and at distances before it. Every rank calls it."""
    from megatron_lighthouse.recipe.trained import over_ranks

    args = trained.args
    samples, seed, length = args.hindsight_samples, args.hindsight_seed, args.seq_length

    def compute(index: int) -> Array:
        return hindsight.losses(hindsight.draw(index, tokens, length, seed), trained.token_losses).ravel()

    found = over_ranks(samples, 2 * len(hindsight.distances(length)), compute, "hindsight").reshape(samples, 2, -1)
    at = numpy.array([hindsight.draw(index, tokens, length, seed).position for index in range(samples)])
    rows = hindsight.by_distance(at, length, found)
    return {"unit": trained.reader.unit, "length": length, "seed": seed, **rows[0], "distances": rows}


def main() -> None:
    """Evaluate as the command line says."""
    if {"-h", "--help"} & {*sys.argv[1:]}:  # Megatron's own takes many seconds, and thousands of lines
        _parser().parse_args(["--help"])
    ask_for_megatron("megatron_lighthouse.recipe.evaluate")
    if "LOCAL_RANK" not in os.environ:  # not under torchrun; Kubernetes' PyTorchJob sets RANK and WORLD_SIZE, of its pods
        os.environ.update(ALONE)
    with quiet_imports():
        import torch

        if not torch.cuda.is_available():
            from megatron_lighthouse import cpu

            cpu.install()
    try:
        trained, tokens, grids = prepared()
    except ValueError as error:
        if not repeats(error, parsed=False):
            raise
        if os.environ["RANK"] == "0":
            print(error, file=sys.stderr)
        raise SystemExit(REFUSED) from error
    measure(trained, tokens, grids)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def prepared() -> tuple[Trained, Array, list[Grid]]:
    """The checkpoint, the held-out tokens and the questions of each probe that the command line asks for. Every rank calls it.

    Raises:
        ValueError: all that is refused, before the model is built.
    """
    with quiet_imports():
        from megatron_lighthouse.recipe import trained as checkpoint

    refused, first = Refused(), os.environ["RANK"] == "0"
    args, iteration = checkpoint.parse(add_arguments, refused)
    if first:
        refused.ask(evaluation_files.check, args.out)
    reader = refused.ask(checkpoint.reader, args)
    files, tokens = (refused.ask(held_out, args, reader) if reader else None) or ([], None)
    if iteration is not None:
        refused.ask(checkpoint.check_not_trained_on, files, checkpoint.training_text(args))
    count = filler = sys.maxsize  # tokens, where the text is not known: as many as it takes
    if reader and tokens is not None:
        count, filler = len(tokens), len(probes.text_for(args, tokens, reader.end))
    asked_for = probes.asked_for(args) if reader else []
    questions = [refused.ask(probes.grid_of, probe, args, filler, reader.encode) for probe in asked_for if reader]
    if args.loss_sequences:
        refused.ask(positions.bucket_edges, args.seq_length, args.loss_grid, args.loss_buckets)
        refused.ask(positions.sequence_starts, count, args.seq_length, args.loss_sequences)
    if args.hindsight_samples:
        refused.said += hindsight_problems(args, count, iteration)
    refused.end()
    assert tokens is not None  # else something was refused
    if first:
        evaluation_files.start(args.out)
    trained = checkpoint.load(args)
    grids = [grid for grid in questions if grid is not None]
    for _, said in grids:
        for line in said:
            say_once(line)
    return trained, tokens, [grid for grid, _ in grids]


def measure(trained: Trained, tokens: Array, grids: Sequence[Grid]) -> None:
    """Take the measurements that are asked for, and write each before the next begins. Every rank calls it."""
    import torch

    args, first = trained.args, torch.distributed.get_rank() == 0
    title = f"{args.load}, iteration {trained.iteration}, {args.attention} attention"
    taken: dict[str, Any] = {"loss": None, **{probe.name: None for probe in probes.PROBES}, "hindsight": None}
    if args.loss_sequences:
        found = held_out_loss.by_position(trained, tokens)
        taken["loss"] = evaluation_files.loss(args.out, found, title) if first else None
    for grid in grids:
        found = probes.answers(grid, trained, tokens)
        taken[grid.probe.name] = evaluation_files.probe(grid.probe, args.out, found, title) if first else None
    if args.hindsight_samples:
        found = hindsight_by_distance(trained, tokens)
        taken["hindsight"] = evaluation_files.hindsight(args.out, found, title) if first else None
    if first:
        evaluation_files.summary(args.out, {**_facts(trained, tokens), **taken})


def _facts(trained: Trained, tokens: Array) -> dict[str, Any]:
    """What was measured, when and by what."""
    import megatron.core
    import torch

    args = trained.args
    return {
        "load": str(args.load),
        "iteration": trained.iteration,
        "attention": args.attention,
        "lighthouse_layers": args.lighthouse_layers,
        "lighthouse_rope": args.lighthouse_rope,
        "lighthouse_causal_selection": args.lighthouse_causal_selection,
        "held_out": {"tokens": len(tokens), "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": {
            "megatron_lighthouse": megatron_lighthouse.__version__,
            "megatron-core": megatron.core.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


if __name__ == "__main__":
    main()
