"""`python -m megatron_lighthouse.recipe.two_stage`: stage 1 with Lighthouse, stage 2 dense, from one command.

Both stages are ordinary runs of `megatron_lighthouse.pretrain_gpt` under torchrun; stage 2 takes up the checkpoint and
the optimizer of stage 1. Stopped anywhere, the same command goes on from the last whole checkpoint. `make train` calls it.
An attention that never becomes dense has one stage, of the iterations of both.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from megatron_lighthouse.launch.torchrun import own_environment, torchrun
from megatron_lighthouse.mcore.command_line import flags, kept
from megatron_lighthouse.needed import ask_for_megatron
from megatron_lighthouse.recipe import next_commands
from megatron_lighthouse.recipe.begun import check_begun
from megatron_lighthouse.recipe.presets import Preset, default_text, preset_for
from megatron_lighthouse.usage import STRAY, WRONG, Parser

SHOWN = ("tokens/s=", "validation loss", "saving checkpoint", "loaded checkpoint", "--text-data has ")
"""Lines of Megatron's log that the terminal shows; the log file has all."""
STOPPED = re.compile(r"SignalException: Process \d+ got signal: ")
"""How torchrun ends that is told to, as by Ctrl-C in its terminal, or by the machine."""
INTERRUPTED = 130
"""The exit status that shells give for it."""


OF_OURS = {
    **dict.fromkeys(("--train-iters", "--exit-interval"), "--steps and --dense-steps"),
    **dict.fromkeys(("--save", "--load", "--tensorboard-dir", "--data-cache-path"), "--runs and --name"),
    "--text-data": "--data",
}
"""Flags of Megatron's that are made of ours: given too, they would win over both stages."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run both stages and draw the pictures; answers an exit status."""
    parser = _parser()
    options, extra = parser.parse_known_args(argv)
    ask_for_megatron("megatron_lighthouse.recipe.two_stage")
    if typed := _cut_short(parser, extra):
        parser.error("unrecognized arguments: " + " ".join(typed))
    for flag, _ in kept.options(extra):
        if flag in OF_OURS:
            parser.error(f"{flag} is made of {OF_OURS[flag]} here: use these.")
    from megatron_lighthouse.variants import VARIANTS, base_in  # torch, which --help need not wait for

    if options.attention not in VARIANTS:
        parser.error(f"--attention {options.attention} is not known: use {', '.join(VARIANTS)}")
    gpus = _gpus()
    preset = preset_for(gpus)
    steps = preset.steps if options.steps is None else options.steps
    dense_steps = preset.dense_steps if options.dense_steps is None else options.dense_steps
    if steps < 1 or dense_steps < 1:
        raise SystemExit(f"--steps {steps} and --dense-steps {dense_steps} must be at least 1.")
    run = Path(options.runs) / options.name
    text = options.data or default_text()
    where = f"{gpus} GPUs" if gpus else f"{preset.processes} CPU processes"
    where = f"{where}, context parallel {preset.context_parallel}"
    variant, total = VARIANTS[options.attention], steps + dense_steps
    # Megatron refuses another word
    asked = {"lighthouse_around": around} if (around := kept.value(extra, "--lighthouse-around")) else {}
    base = base_in(argparse.Namespace(attention=options.attention, **asked))
    assert base is not None
    stages = {variant.name: (0, steps), base.name: (steps, total)} if variant.switches else {variant.name: (0, total)}
    arguments = {
        attention: _arguments(preset, run, attention, base.position, stop, total, text, extra)
        for attention, (_, stop) in stages.items()
    }
    try:
        check_begun(run, arguments, (stages[variant.name][1], total - stages[variant.name][1]))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if wrong := [*dict.fromkeys(problem for words in arguments.values() for problem in _problems(words, run, preset))]:
        print("The run cannot start as asked:\n  - " + "\n  - ".join(wrong), file=sys.stderr)
        return WRONG
    run.mkdir(parents=True, exist_ok=True)
    print(f"{run}: {stages[variant.name][1]} iterations with {variant.title}", end="")
    print(f", then {dense_steps} of {base.title}, on {where}" if variant.switches else f", on {where}", flush=True)
    if _iterations_done(run) >= total:
        print("Nothing was left to train: the last command below goes on, and --name NAME (NAME= of make) begins another run.")
    if status := _train(run, stages, arguments, preset):
        if status == INTERRUPTED:
            done = _iterations_done(run)
            goes_on = f": the same command goes on from iteration {done}." if done else ", before a checkpoint: it begins anew."
            print(f"\nInterrupted{goes_on}", file=sys.stderr)
        return status
    _draw(run, where, list(stages))
    start, last = torchrun(preset.processes), arguments[list(stages)[-1]]
    print(next_commands.told(run, last, start, _iterations_done(run), dense_steps, len(stages) > 1))
    return 0


def _train(run: Path, stages: Mapping[str, tuple[int, int]], arguments: Mapping[str, Sequence[str]], preset: Preset) -> int:
    """Run what is left of each stage, from its first iteration to its last; answers the status of the first that fails."""
    for attention, (start, stop) in stages.items():
        done = _iterations_done(run)
        if done >= stop:
            print(f"{attention}: trained already, to iteration {stop}", flush=True)
            continue
        if done < start:
            raise SystemExit(f"{run} ends at iteration {done}, before its stage {attention} begins at {start}.")
        status = _follow(_command(preset, arguments[attention]), run / f"{attention}.log", _environment(preset))
        if status:
            return status
        if _iterations_done(run) < stop:
            raise SystemExit(
                f"{attention} stopped at iteration {_iterations_done(run)}, before {stop}: run the same command again."
            )
    return 0


def _cut_short(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Those of the words for Megatron that are none of its flags, and nearly one of these; of those behind a -- that alone."""
    known = {flag for one in flags.listed() for flag in one["flags"]}
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    if STRAY in given:
        return [STRAY]
    own = [*parser._option_string_actions]
    return [word for word in given if word not in known and get_close_matches(word, own, 1, 0.7)]


def _problems(words: Sequence[str], run: Path, preset: Preset) -> list[str]:
    """What the check before queuing refuses of a command line, and the run would once its processes have begun."""
    from megatron_lighthouse.launch.check import settled
    from megatron_lighthouse.launch.data_files import data
    from megatron_lighthouse.launch.layout import layout
    from megatron_lighthouse.launch.sizes import sizes
    from megatron_lighthouse.mcore.command_line import numbers, pyramid
    from megatron_lighthouse.mcore.command_line.entry import with_all_arguments

    args, wrong = flags.parse(words, with_all_arguments, strict=flags.installed() == flags.VERSION)
    args = settled(args)
    wrong += numbers.settle(args)
    vars(args).update(pyramid.choice(args, run / "checkpoints")[0])
    found = [*layout(args, 1, preset.processes), *sizes(args, runs_here="now"), *data(args, {})]
    return [*wrong, *flags.apart(found, args.malformed)]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m megatron_lighthouse.recipe.two_stage",
        description="Train a small GPT: stage 1 with Lighthouse, stage 2 without. Other arguments go to Megatron, to both.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--attention",
        default="lighthouse",
        help="of stage 1; one that never becomes dense has no stage 2 (default: %(default)s)",
    )
    parser.add_argument("--name", default="demo", help="the run's folder under --runs (default: %(default)s)")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: %(default)s)")
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="text files or folders (default: the Python library's sources and reference)"
    )
    parser.add_argument("--steps", type=int, help="iterations of stage 1")
    parser.add_argument("--dense-steps", type=int, help="iterations of stage 2")
    return parser


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _environment(preset: Preset) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // preset.processes)
    # Hopper with tensor parallelism needs one connection, for Megatron to order communication before computation
    defaults = {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONUNBUFFERED": "1"}
    interval = {"LIGHTHOUSE_PROGRESS_SECONDS": "0.5"} if sys.stdout.isatty() else {}
    return {**defaults, **interval, **own_environment()}


def _command(preset: Preset, arguments: Sequence[str]) -> list[str]:
    return [*torchrun(preset.processes), "-m", "megatron_lighthouse.pretrain_gpt", *arguments]


def _arguments(
    preset: Preset,
    run: Path,
    attention: str,
    position: str | None,
    stop: int,
    total: int,
    text: Sequence[str],
    extra: Sequence[str],
) -> list[str]:
    """Megatron's, paths as `kept` writes them; of the position embedding that is not the preset's."""
    from megatron_lighthouse.variants import VARIANTS

    run = run.absolute()
    checkpoints = str(run / "checkpoints")
    every = max(1, stop // 2)
    return [
        *("--attention", attention),
        *preset.arguments,
        *(("--position-embedding-type", position) if position else ()),
        # both stages name the whole length, so that the order of the data and the learning rate are those of one run
        *("--train-iters", str(total), "--exit-interval", str(stop), "--eval-interval", str(stop)),
        *("--save", checkpoints, "--load", checkpoints, "--save-interval", str(every)),
        *("--data-cache-path", str(run / "data"), "--tensorboard-dir", str(run / "tensorboard" / attention)),
        *(("--lighthouse-selection-map", str(run / "selection.png")) if VARIANTS[attention].selects else ()),
        *extra,
        *("--text-data", *(os.path.realpath(path) for path in text)),
    ]


def _follow(command: Sequence[str], log: Path, environment: dict[str, str]) -> int:
    """Run `command`, all its output in `log`, the progress on the terminal. The last lines too, if it fails.

    Answers its status, or INTERRUPTED where it was told to stop, or this process was.
    """
    last: deque[str] = deque(maxlen=40)
    failed = False  # torchrun's own report follows, which hides the error that caused it
    stopped = False
    in_place, drawn = sys.stdout.isatty(), False
    with log.open("a") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                failed = failed or "torch/distributed/elastic" in line
                stopped = stopped or STOPPED.search(line) is not None
                if not failed:
                    last.append(line)
                if any(mark in line for mark in SHOWN):
                    over = in_place and "tokens/s=" in line
                    before = "\r\x1b[K" if over else "\n" if drawn else ""  # a line over the last, or below it
                    print(before + line.strip(), end="" if over else "\n", flush=True)
                    drawn = over
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            file.writelines(process.stdout)  # its last words: where none reads them, it cannot end
            process.wait()
            return INTERRUPTED
        except BaseException:
            process.terminate()  # torchrun passes it on to its workers
            process.wait()
            raise
    if stopped:
        return INTERRUPTED
    if status:
        print("".join(last), f"\nThe run failed; its whole log is in {log}.", file=sys.stderr)
    return status


def _iterations_done(run: Path) -> int:
    """The iteration of the last whole checkpoint."""
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def _draw(run: Path, where: str, stages: Sequence[str]) -> None:
    from megatron_lighthouse import plots
    from megatron_lighthouse.mcore.data.text import byte_entropy

    data = sorted((run / "data").glob("text-*-train.bin"), key=lambda path: path.stat().st_mtime)
    entropy = byte_entropy(str(data[-1].with_suffix(""))) if data else None
    logs = {attention: plots.read_scalars(run / "tensorboard" / attention) for attention in stages}
    plots.loss_curve(logs, run / "loss.png", entropy, title=f"{run.name}: {where}")
    for attention, scalars in logs.items():
        if "lm loss" not in scalars:  # a stage shorter than --tensorboard-log-interval
            continue
        steps, values = scalars["lm loss"]
        validation = ""
        if "lm loss validation" in scalars:
            at, found = scalars["lm loss validation"]
            validation = f"; validation loss {found[-1]:.3f} at iteration {at[-1]}"
        print(f"{attention}: loss {values[-1]:.3f} at iteration {steps[-1]}{validation}")
    if entropy is not None:
        print(f"byte-frequency entropy of the text: {entropy:.3f}")
    own = sorted((run / "tensorboard").glob("*/*.png"))
    pictures = [path for path in (run / "loss.png", run / "selection.png", *own) if path.is_file()]
    print(f"pictures: {', '.join(map(str, pictures))}; log: tensorboard --logdir {run / 'tensorboard'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else torchrun would be left behind
    sys.exit(main())
