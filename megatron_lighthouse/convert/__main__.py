"""`python -m megatron_lighthouse.convert`: checkpoints from Hugging Face to Megatron's `torch_dist`, and back.

hf-to-megatron writes a folder that a run loads (--load), `model.args` with the model's arguments, and beside them tokenizer
and config.json. megatron-to-hf makes a Hugging Face folder of a run's checkpoint, whatever its layout was. verify compares two
folders. No GPU is needed, and no more memory than three times the largest tensor and 1 GiB.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lighthouse.usage import Parser


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="python -m megatron_lighthouse.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="{hf-to-megatron,megatron-to-hf,verify}")
    there = commands.add_parser("hf-to-megatron", help="a Hugging Face folder -> one that a run loads")
    back = commands.add_parser("megatron-to-hf", help="a run's checkpoint -> a Hugging Face folder")
    verify = commands.add_parser("verify", help="whether two folders hold the same model, to the bit; status 1 if not")
    for command, (source, target) in {there: ("HF_FOLDER", "MEGATRON_FOLDER"), back: ("MEGATRON_FOLDER", "HF_FOLDER")}.items():
        command.add_argument("source", type=Path, metavar=source)
        command.add_argument("target", type=Path, metavar=target)
        command.add_argument("--force", action="store_true", help="replace what an earlier conversion wrote to the target")
    verify.add_argument("source", type=Path, metavar="FOLDER")
    verify.add_argument("target", type=Path, metavar="FOLDER")
    patterns = "tensors of the Hugging Face folder that the model does not need, as shell patterns"
    like = "config.json and tokenizer, where the run did not begin from a converted checkpoint that is still there"
    for command in (there, verify):
        command.add_argument("--leave-out", nargs="+", default=[], metavar="PATTERN", help=patterns)
    for command in (there, back, verify):
        command.add_argument("--no-mtp", action="store_true", help="leave out layers that predict further tokens")
    for command in (back, verify):
        command.add_argument("--like", type=Path, metavar="FOLDER", help=like)
    back.add_argument("--ckpt-step", type=int, metavar="N", help="the checkpoint of iteration N; default: the newest")
    back.add_argument("--shard-gb", type=float, default=5.0, help="size of a file of safetensors; default: %(default)s")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return run(options)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}" if isinstance(error, OSError) else error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Carry out what was asked for; what to say goes to stdout."""
    mtp = not options.no_mtp
    if options.command == "verify":
        from megatron_lighthouse.convert.verify import differences

        lines = differences(options.source, options.target, like=options.like, leave_out=options.leave_out, mtp=mtp)
        of_tensors = [line for line in lines if not line.startswith("config.json ")]
        print("\n".join([*lines, "tensors differ" if of_tensors else "all tensors are the same to the bit"]))
        return int(bool(of_tensors))
    if options.command == "hf-to-megatron":
        from megatron_lighthouse.convert import to_megatron

        said = to_megatron.convert(options.source, options.target, force=options.force, leave_out=options.leave_out, mtp=mtp)
    else:
        from megatron_lighthouse.convert import to_hugging_face

        if not options.shard_gb > 0:
            raise ValueError(f"--shard-gb {options.shard_gb} must be above 0: use 5.")
        given: dict[str, Any] = {"step": options.ckpt_step, "like": options.like, "shard": int(options.shard_gb * 1e9)}
        said = to_hugging_face.convert(options.source, options.target, force=options.force, mtp=mtp, **given)
    print("\n".join(said))
    return 0


def _stop(number: int, _: object) -> None:
    """Leaves through the blocks that remove what is unfinished."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
