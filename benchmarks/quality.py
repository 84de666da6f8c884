"""`python benchmarks/quality.py --runs dense norm-60 --work FOLDER --out FOLDER`: is the model at the end as good as dense?

Trains the runs of quality_runs.py one after the other, by the product's own commands, evaluates each checkpoint on held-out
text, and measures what the switch cost. See docs/quality.md. --out gets a few small tables (quality_results.py), renewed every
quarter of a minute; checkpoints and logs stay in --work. The same command again goes on where it was cut off, and skips what is
finished. Two such commands may run side by side, on different GPUs (CUDA_VISIBLE_DEVICES) with different --runs, and the same
--work and --out. Arguments that are not known here go to Megatron, in all runs.

    python benchmarks/quality.py --draw FOLDER [FOLDER …]            pictures and a table of what is there, without a GPU
    python benchmarks/quality.py --remake FOLDER --out NEW           all tables from a --work folder, or from work.tgz, unpacked
    python benchmarks/quality.py --merge FOLDER FOLDER … --out NEW   results of several machines in one folder
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import gettempdir
from threading import Lock

import quality_pairs
import quality_results as tables
from measure import environment, one_rank
from quality_runs import (
    MODELS,
    REFERENCE,
    RUNS,
    Run,
    Size,
    and_also,
    attention_arguments,
    check,
    hardware,
    implementation,
    model_arguments,
)

from megatron_lighthouse.recipe import corpus, passkey

SAVES = 2
"""Checkpoints a run, and one at the switch."""
EVERY = 15
"""Seconds between two looks at a run that is under way."""
START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.0f} s] {text}\n", end="", flush=True)  # two threads speak


class Bench:
    """The runs of one --work folder."""

    def __init__(self, options: argparse.Namespace, more: Sequence[str]) -> None:
        self.work, self.out, self.corpus, self.packages = options.work, options.out, options.corpus, options.packages
        model = MODELS[options.model]
        steps, length, batch = (
            getattr(model, name) if getattr(options, name) is None else getattr(options, name)
            for name in ("steps", "seq_length", "batch")
        )
        self.size = Size(options.model, length, steps, batch)
        self.smooth = options.smooth or max(2, self.size.steps // 40)
        self.probes = [*("--loss-sequences", str(options.loss_sequences), "--passkey-samples", str(options.passkey_samples))]
        self.unbalanced = passkey.Grid([], [], options.passkey_samples).unbalanced()
        self.of_machine, self.more, self.environment = implementation(), list(more), environment()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.publishing, self.said = Lock(), ""
        check(options.runs, self.size)
        self.work.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """The corpus, made once for all who share --work, and what quality.json says of it."""
        with _locked(self.work / "corpus.lock"):
            if self.corpus is None:
                self.corpus = self.work / "corpus"
                if not self.corpus.exists():
                    say("making the corpus")
                    half = self.work / "corpus.partial"
                    shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
                    more = ["--packages", *self.packages] if self.packages else []
                    corpus.main(["--out", str(half), "--megabytes", "0", *more])
                    os.replace(half, self.corpus)
            manifest = self.corpus / "manifest.json"
            facts = {"folder": str(self.corpus)}
            if manifest.exists():
                facts |= {"manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
                facts |= json.loads(manifest.read_text())
            tables.write_json(self.work / "corpus.json", facts)
        have = sum(file.stat().st_size for file in (self.corpus / "train").rglob("*.txt"))
        need = self.size.tokens * self.size.steps
        if self.unbalanced:
            say(self.unbalanced)
        say(f"corpus {self.corpus}: {have / 1e6:.1f} MB to train on, a run reads {need / 1e6:.1f} ({need / have:.2f} epochs)")

    def all(self, names: list[str]) -> list[str]:
        """Train and evaluate these runs, as far as that is not done; answers those that failed.

        A run is evaluated while the next one starts: its process needs the GPU only half a minute later.
        """
        failed: list[str] = []
        evaluations: dict[str, Future[int]] = {}
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(1))
            stack.callback(self._end)  # before the pool waits
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            for name in names:
                (self.work / name).mkdir(exist_ok=True)
                refusal = f"--runs {name} is under way in another process: give the two different runs."
                stack.enter_context(_locked(self.work / name / "lock", refusal))
                train, evaluate = self._commands(name, RUNS[name])
                self._remember(name, RUNS[name], train, evaluate)
                if self._train(name, train):
                    failed.append(name)
                else:
                    evaluations[name] = pool.submit(self._evaluate, name, evaluate)
            return failed + [name for name, evaluation in evaluations.items() if evaluation.result()]

    def _end(self) -> None:
        """End what runs: nothing, but where this process was told to stop."""
        for process in self.processes:
            process.terminate()

    def _train(self, name: str, command: list[str]) -> int:
        folder = self.work / name
        if self._iterations_done(folder) >= self.size.steps:
            return 0
        say(f"{name}: training, {RUNS[name].title}, from iteration {self._iterations_done(folder)}")
        return self._follow(name, command, folder / "train.log")

    def _evaluate(self, name: str, command: list[str]) -> int:
        folder = self.work / name
        if tables.read_json(folder / "evaluation" / "evaluation.json") is None:
            say(f"{name}: evaluating")
            status = self._follow(name, command, folder / "evaluate.log")
            if status:
                return status
        for checkpoint in (folder / "checkpoints").glob("iter_*"):
            if checkpoint.name != f"iter_{self.size.steps:07}":
                shutil.rmtree(checkpoint)  # half a gigabyte each
        results = self.publish()
        found = results.of("runs", name)[0] if results else {}
        shown = ("seconds", "training_loss", "held_out_loss", "noise_accuracy", "noise_log_probability")
        say(
            f"{name}: done; "
            + ", ".join(f"{key.replace('_', ' ')} {found[key]:.4g}" for key in shown if found.get(key) is not None)
        )
        return 0

    def publish(self, must: bool = False) -> tables.Results | None:
        """Renew --out from all that --work holds, also of other processes.

        What goes wrong here is said and, unless it `must` go well, not raised: the runs that are still to come are worth more.
        """
        with self.publishing:
            try:
                tables.pack(self.work, self.out / "work.tgz")
                results = tables.from_work(self.work)
                quality_pairs.write(results, self.out)
            except Exception as error:
                if must:
                    raise
                said = f"--out {self.out} could not be renewed: {type(error).__name__}: {error}"
                if said != self.said:
                    say(said)
                self.said = said
                return None
        return results

    def _commands(self, name: str, run: Run) -> tuple[list[str], list[str]]:
        folder = self.work / name
        checkpoints = str(folder / "checkpoints")
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(run.ranks), "-m"] if run.ranks > 1 else []
        # Megatron's index files are not written whole, so processes side by side have each their own
        data = self.work / f"data-{os.environ.get('CUDA_VISIBLE_DEVICES') or 'all'}"
        of_model = model_arguments(run, self.size, self.of_machine)
        train = [
            *(sys.executable, "-m", *torchrun, "megatron_lighthouse.pretrain_gpt"),
            *(*of_model, *attention_arguments(run, self.size), *self.more),
            *("--save", checkpoints, "--load", checkpoints, "--save-interval", str(max(1, self.size.steps // SAVES))),
            *("--tensorboard-dir", str(folder / "tensorboard"), "--data-cache-path", str(data)),
            *("--text-data", str(self.corpus / "train")),
        ]
        evaluate = [
            *(sys.executable, "-m", "megatron_lighthouse.recipe.evaluate", *of_model, *self.more, "--attention", "dense"),
            *("--load", checkpoints, "--held-out", str(self.corpus / "held-out"), "--out", str(folder / "evaluation")),
            *self.probes,
        ]
        return train, evaluate

    def _remember(self, name: str, run: Run, train: list[str], evaluate: list[str]) -> None:
        """run.json. A folder's run keeps its arguments for good, and names all GPUs that it has been trained on.

        Raises:
            ValueError: --work has a run of this name that was trained otherwise.
        """
        size, path = self.size, self.work / name / "run.json"
        arguments = [*model_arguments(run, size, self.of_machine), *attention_arguments(run, size), *self.more, *self.probes]
        arguments += ["--corpus", str(self.corpus)]
        known = json.loads(path.read_text()) if path.exists() else {}
        before = known.get("arguments", arguments)
        if before != arguments:
            flags = [{f"{a} {b}" for a, b in pairwise(these) if a.startswith("--")} for these in (before, arguments)]
            old, new = (" ".join(sorted(these)) for these in (flags[0] - flags[1], flags[1] - flags[0]))
            raise ValueError(f"--work {self.work} holds {name} with {old}, not {new}: name another folder, or the same values.")
        facts = {"run": name, "title": run.title, "seed": run.seed, "ranks": run.ranks, "model": size.model}
        facts |= {"seq_length": size.seq_length, "tokens": size.tokens, "steps": size.steps, "smooth": self.smooth}
        facts |= {"switch": run.switch(size.steps), "dense_from": run.dense_from(size.steps) if run.share else 1}
        facts |= {"command": shlex.join(sys.argv), "train": shlex.join(train), "evaluate": shlex.join(evaluate)}
        facts |= {"versions": self.environment, "arguments": arguments}
        device, gpu = hardware(run.ranks)
        if self._iterations_done(path.parent) >= size.steps:  # nothing is trained here
            facts |= {name: known[name] for name in ("versions", "device", "gpu") if name in known}
        else:
            facts |= {"device": and_also(known.get("device"), device), "gpu": and_also(known.get("gpu"), gpu)}
        tables.write_json(path, facts)

    def _follow(self, name: str, command: list[str], log: Path) -> int:
        """Run `command`, its output in `log`, and publish now and then. The log's end is shown where it fails."""
        settings = {"OMP_NUM_THREADS": "4", "PYTHONUNBUFFERED": "1", "LIGHTHOUSE_PROGRESS_SECONDS": "60"}
        # a port that is free now may not be when the process asks for it: 0 lets it choose (torchrun sets another)
        environment = {**settings, **one_rank(), "MASTER_PORT": "0"}
        with log.open("a") as file:
            file.write(tables.STARTED)
            file.flush()
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        self.processes.append(process)
        shown = 0
        try:
            while process.poll() is None:
                try:
                    process.wait(EVERY)
                except subprocess.TimeoutExpired:
                    shown = self._show(name, log, shown)
        finally:
            process.terminate()
            status = process.wait()
        self.publish()
        if status:
            say(f"{name}: ended with status {status}; {log} ends with\n{log.read_text(errors='replace')[-3000:]}")
        return status

    def _show(self, name: str, log: Path, shown: int) -> int:
        """Publish, and say how far a run is at its first iteration and every tenth of it; answers the last iteration said."""
        if self.publish() is None:
            return shown
        point = (tables.curve(log.read_text(errors="replace")) or [{"iteration": 0}])[-1]
        now = int(point["iteration"])
        if now == 0 or 0 < shown <= now < shown + self.size.steps // 10:
            return shown
        say(f"{name}: iteration {now} of {self.size.steps}, loss {point['loss']:.4f}, {point['seconds']:.3f} s")
        return now

    def _iterations_done(self, folder: Path) -> int:
        tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0


@contextmanager
def _locked(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Alone among the processes that name `path`, after the others or, with `refusal`, not at all."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise ValueError(refusal) from None
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    titles = ", ".join(f"{name} ({run.title})" for name, run in RUNS.items()).replace("%", "%%")
    add("--runs", nargs="+", choices=list(RUNS), default=[REFERENCE, "norm-60"], metavar="RUN", help=titles)
    add("--out", type=Path, metavar="FOLDER", help="for the tables (default: benchmarks/results/quality)")
    add("--work", type=Path, default=Path(gettempdir()) / "quality", metavar="FOLDER", help="for checkpoints and logs")
    add("--model", choices=list(MODELS), default="40m", help="'tiny' is for a CPU (default: %(default)s)")
    add("--steps", type=int, help="iterations of every run (default: the model's: 800)")
    add("--seq-length", type=int, help="tokens of a sequence (default: the model's: 32768)")
    add("--batch", type=int, help="sequences an iteration (default: the model's: 2)")
    add("--corpus", type=Path, metavar="FOLDER", help="one of recipe.corpus (default: made in --work)")
    add("--packages", nargs="+", metavar="NAME", help="of that corpus (default: recipe.corpus's)")
    add("--smooth", type=int, metavar="W", help="losses in a mean (default: a fortieth of --steps)")
    add("--loss-sequences", type=int, default=200, help="of the evaluation (default: %(default)s)")
    add("--passkey-samples", type=int, default=20, help="of the evaluation, a cell: a multiple of ten (default: %(default)s)")
    add("--remake", type=Path, metavar="WORK", help="write all tables again, in --out, from what is left in this folder")
    add("--merge", nargs="+", type=Path, metavar="FOLDER", help="put results together in --out")
    add("--draw", nargs="+", type=Path, metavar="FOLDER", help="draw results, in --out or the first folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; answers an exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run under way ends too
    parser = _parser()
    options, more = parser.parse_known_args(argv)
    try:
        if options.remake:
            results = tables.from_work(options.remake)
            if options.out is None or not results.facts["runs"]:
                missing = "needs --out, a folder for the tables" if options.out is None else "has no FOLDER/RUN/run.json"
                raise ValueError(f"--remake {options.remake} {missing}: give a --work folder, or work.tgz unpacked, and --out.")
            quality_pairs.write(results, options.out)
            return 0
        if options.merge or options.draw:
            results = tables.merged(tables.read(folder) for folder in options.merge or options.draw)
            if options.merge:
                if options.out is None:
                    raise ValueError("--merge needs --out, a folder for what is put together.")
                quality_pairs.write(results, options.out)
            if options.draw:
                import quality_plots

                quality_plots.draw(results, options.out or options.draw[0])
            return 0
        options.out = options.out or Path(__file__).parent / "results" / "quality"
        bench = Bench(options, more)
        bench.prepare()
        failed = bench.all(options.runs)
        bench.publish(must=True)
    except ValueError as error:
        parser.error(str(error))
    say(f"failed: {', '.join(failed)}" if failed else f"results: {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
