"""An experiment's runs as processes: trained, evaluated, taken up again where they were cut off. Ours."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Lock

from experiments import archive, pairs, tables, work
from experiments.commands import Commands
from experiments.machine import and_also, hardware, implementation, seeing, shared_out
from experiments.runs import EXPERIMENTS, Size, check
from megatron_lighthouse.launch.torchrun import one_rank
from megatron_lighthouse.recipe import corpus, hindsight
from megatron_lighthouse.recipe.printed_log import curve
from megatron_lighthouse.recipe.probe import unbalanced
from megatron_lighthouse.recipe.probes import PROBES
from megatron_lighthouse.versions import environment

EVERY = 15
"""Seconds between two looks at a run that is under way."""
ENDING, SAVING = 40, 30
"""Seconds before the end of --within at which processes are told to save and end, and that they have for it."""
CUT_OFF = 75
"""The status of what goes on with the same command: EX_TEMPFAIL."""
START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.0f} s] {text}\n", end="", flush=True)  # threads speak


class Bench:
    """The runs of one --work folder, which are of one experiment."""

    def __init__(self, options: argparse.Namespace, more: Sequence[str]) -> None:
        self.work, self.out, self.corpus, self.packages = options.work, options.out, options.corpus, options.packages
        experiment = EXPERIMENTS[options.experiment]
        steps, length, batch, sequences, *questions = (
            getattr(experiment, name) if getattr(options, name) is None else getattr(options, name)
            for name in ("steps", "seq_length", "batch", "loss_sequences", *(f"{probe.name}_samples" for probe in PROBES))
        )
        self.runs, self.size, self.at_once = experiment.runs, Size(options.experiment, length, steps, batch), options.at_once
        self.smooth = options.smooth or max(2, self.size.steps // 40)
        self.until = math.inf if options.within is None else START + options.within - ENDING
        asked = dict(zip(PROBES, questions, strict=True))
        probes = ["--loss-sequences", str(sequences)]
        probes += [word for probe, count in asked.items() for word in (f"--{probe.name}-samples", str(count))]
        foresight = ["--hindsight-samples", str(options.hindsight_samples)]
        self.commands = Commands(self.size, implementation(), list(more), probes, foresight)
        self.uneven = [said for probe, count in asked.items() if (said := unbalanced(probe, count))]
        self.environment = environment()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.publishing, self.published, self.renewed, self.said = Lock(), -math.inf, False, ""
        check(options.runs, self.size, options.at_once)
        for name, count in {"loss-sequences": sequences, **{f"{probe.name}-samples": n for probe, n in asked.items()}}.items():
            if count < 0:  # refused now, not when a run is trained
                raise ValueError(f"--{name} {count} must be at least 0, for none.")
        if options.within is not None and options.within <= ENDING:
            raise ValueError(f"--within {options.within} leaves no time: give more than the {ENDING} s that saving may take.")
        self.gpus = shared_out({name: self.runs[name].ranks for name in options.runs}, self.at_once)
        self.foreseen = options.hindsight_samples if any(self.runs[name].hindsight for name in options.runs) else 0
        self.work.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """The corpus, made once for all who share --work, and what quality.json says of it.

        Raises:
            ValueError: a corpus that holds out too little, or a number of samples that cannot be.
        """
        with _locked(self.work / "corpus.lock"):
            if self.corpus is None:
                self.corpus = self.work / "corpus"
                if not self.corpus.exists():
                    say("making the corpus")
                    more = ["--packages", *self.packages] if self.packages else []
                    corpus.main(["--out", str(self.corpus), "--megabytes", "0", *more])
            manifest = self.corpus / "manifest.json"
            facts = {"folder": str(self.corpus)}
            if manifest.exists():
                facts |= {"manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
                facts |= json.loads(manifest.read_text())
            tables.write_json(self.work / "corpus.json", facts)
        have = sum(file.stat().st_size for file in (self.corpus / "train").rglob("*.txt"))
        if not have:
            raise ValueError(
                f"--corpus {self.corpus} has no train/*.txt: give a folder that recipe.corpus made, or leave it out."
            )
        if self.foreseen:  # refused now, not when a run is trained
            held_out = sum(file.stat().st_size + 1 for file in (self.corpus / "held-out").rglob("*.txt"))
            hindsight.check(held_out, self.size.seq_length, self.foreseen, seed=0)
        need = self.size.tokens * self.size.steps
        for said in self.uneven:
            say(said)
        say(f"corpus {self.corpus}: {have / 1e6:.1f} MB to train on, a run reads {need / 1e6:.1f} ({need / have:.2f} epochs)")

    def all(self, names: list[str]) -> dict[str, int]:
        """Train and evaluate these runs, as far as that is not done; answers each one's status, `CUT_OFF` of --within.

        A run is evaluated while the next one starts: its process needs the GPU only half a minute later.
        """
        with ExitStack() as stack:
            training, evaluating = (stack.enter_context(ThreadPoolExecutor(self.at_once)) for _ in range(2))
            stack.callback(self._end)  # before the pools wait
            for pool in (training, evaluating):
                stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            for name in names:
                (self.work / name).mkdir(exist_ok=True)
                refusal = f"--runs {name} is under way in another process: give the two different runs."
                stack.enter_context(_locked(self.work / name / "lock", refusal))
                self._remember(name)
            trained = {training.submit(self._guarded, self._train, name): name for name in names}
            statuses: dict[str, int] = {}
            evaluated: dict[str, Future[int]] = {}
            for future in as_completed(trained):
                name = trained[future]
                statuses[name] = future.result()
                if not statuses[name] and not self.runs[name].until:
                    evaluated[name] = evaluating.submit(self._guarded, self._evaluate, name)
            return statuses | {name: evaluation.result() for name, evaluation in evaluated.items()}

    def _guarded(self, step: Callable[[str], int], name: str) -> int:
        """The status of `step`, 1 where it raises: the runs beside it go on."""
        try:
            return step(name)
        except Exception:
            say(f"{name}: {traceback.format_exc()}")
            return 1

    def _end(self) -> None:
        """End what runs: nothing, but where this process was told to stop."""
        for process in self.processes:
            process.terminate()

    def _train(self, name: str) -> int:
        folder, run = self.work / name, self.runs[name]
        if self._iterations_done(folder) >= self.size.last(run):
            return 0
        say(f"{name}: training, {run.title}, from iteration {self._iterations_done(folder)}")
        status = self._follow(name, self.commands.training(run, folder, self.corpus), folder / "train.log")
        return status or (CUT_OFF if self._iterations_done(folder) < self.size.last(run) else 0)

    def _evaluate(self, name: str) -> int:
        folder, run = self.work / name, self.runs[name]
        measurements = {"evaluation": self.commands.evaluation(run, folder, self.corpus)}
        if run.hindsight:
            measurements["hindsight"] = self.commands.hindsight(run, folder, self.corpus)
        for measurement, command in measurements.items():
            if tables.read_json(folder / measurement / "evaluation.json") is None:
                say(f"{name}: {measurement}")
                status = self._follow(name, command, folder / f"{measurement}.log")
                if status:
                    return status
        for checkpoint in (folder / "checkpoints").glob("iter_*"):
            if checkpoint.name != f"iter_{self.size.steps:07}":
                shutil.rmtree(checkpoint)  # half a gigabyte each
        self.publish()
        found = work.from_work(self.work).of("runs", name)[0]
        shown = ("seconds", "steady_seconds", "training_loss", "held_out_loss", "noise_accuracy", "noise_log_probability")
        say(
            f"{name}: done; "
            + ", ".join(f"{key.replace('_', ' ')} {found[key]:.4g}" for key in shown if found.get(key) is not None)
        )
        return 0

    def publish(self, must: bool = False) -> bool:
        """Renew --out from all that --work holds, also of other processes; answers whether it went well, the last time.

        Not again within `EVERY` seconds, unless it `must`. What goes wrong is said and, unless it must go well, not raised: the
        runs that are still to come are worth more.
        """
        with self.publishing:
            if not must and time.monotonic() - self.published < EVERY:
                return self.renewed
            try:
                with _locked(self.work / "publish.lock"):
                    archive.pack(self.work, self.out / archive.NAME)
                    pairs.write(work.from_work(self.work), self.out)
                self.renewed = True
            except Exception as error:
                if must:
                    raise
                said = f"--out {self.out} could not be renewed: {type(error).__name__}: {error}"
                if said != self.said:
                    say(said)
                self.said, self.renewed = said, False
            self.published = time.monotonic()
            return self.renewed

    def _remember(self, name: str) -> None:
        """run.json. A folder's run keeps its arguments for good, and names all GPUs that it has been trained on.

        Raises:
            ValueError: --work has runs of another experiment, or this one trained otherwise.
        """
        run, size, path = self.runs[name], self.size, self.work / name / "run.json"
        others = {work.facts_of(other)["experiment"] for other in self.work.glob("*/run.json")} - {size.experiment}
        if others:
            raise ValueError(f"--work {self.work} holds runs of {others.pop()}, not {size.experiment}: name another folder.")
        arguments = [*self.commands.arguments(run), "--corpus", str(self.corpus)]
        known = work.facts_of(path) if path.exists() else {}
        before, log = known.get("arguments", arguments), path.parent / "train.log"
        if before != arguments and not self._iterations_done(path.parent):
            if log.exists():
                log.replace(f"{log}.before")  # of what was refused, or ended before it saved
        elif before != arguments:
            flags = [{f"{a} {b}" for a, b in pairwise(these) if a.startswith("--")} for these in (before, arguments)]
            old, new = (" ".join(sorted(these)) for these in (flags[0] - flags[1], flags[1] - flags[0]))
            raise ValueError(f"--work {self.work} holds {name} with {old}, not {new}: name another folder, or the same values.")
        facts = {"run": name, "experiment": size.experiment, "title": run.title, "seed": run.seed, "ranks": run.ranks}
        facts |= {"at_once": max(self.at_once, known.get("at_once", 1)), "smooth": self.smooth}
        facts |= {"seq_length": size.seq_length, "evaluated": size.evaluated, "tokens": size.tokens, "steps": size.steps}
        facts |= {"switch": run.switch(size.steps), "dense_from": run.dense_from(size.steps)}
        facts |= {"warmup": run.warmup_to(size.steps)} if run.warmup else {}
        commands = self.commands.of(run, path.parent, self.corpus)
        facts |= {"command": shlex.join(sys.argv)}
        facts |= {what: shlex.join(["python", *command[1:]]) for what, command in commands.items()}
        facts |= {"versions": self.environment, "arguments": arguments}
        device, gpu = hardware(self.gpus[name])
        if self._iterations_done(path.parent) >= size.last(run):  # nothing is trained here
            facts |= {key: known[key] for key in ("versions", "device", "gpu", "at_once") if key in known}
        else:
            facts |= {"device": and_also(known.get("device"), device), "gpu": and_also(known.get("gpu"), gpu)}
        tables.write_json(path, facts)

    def _follow(self, name: str, command: list[str], log: Path) -> int:
        """Run `command`, its output in `log`, and publish now and then. The log's end is shown where it fails.

        At the end of --within it is told to save and end, and its status is `CUT_OFF`, as of what would begin then.
        """
        if time.monotonic() > self.until:
            return CUT_OFF
        settings = {"OMP_NUM_THREADS": "4", "PYTHONUNBUFFERED": "1", "LIGHTHOUSE_PROGRESS_SECONDS": "60"}
        environment = {**settings, **one_rank(), **seeing(self.gpus[name])}  # torchrun sets ranks and ports of its own
        with log.open("a") as file:
            file.write(work.STARTED)
            file.flush()
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        self.processes.append(process)
        shown = 0
        try:
            while process.poll() is None and (left := self.until - time.monotonic()) > 0:
                try:
                    process.wait(min(EVERY, left))
                except subprocess.TimeoutExpired:
                    shown = self._show(name, log, shown)
        finally:
            late = process.poll() is None
            process.terminate()
            try:
                status = process.wait(SAVING)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
        self.publish()
        if late:
            return CUT_OFF
        if status:
            say(f"{name}: ended with status {status}; {log} ends with\n{log.read_text(errors='replace')[-3000:]}")
        return status

    def _show(self, name: str, log: Path, shown: int) -> int:
        """Publish, and say how far a run is at its first iteration and every tenth of it; answers the last iteration said."""
        if not self.publish():
            return shown
        point = (curve(log.read_text(errors="replace"), work.STARTED) or [{"iteration": 0}])[-1]
        now = int(point["iteration"])
        if now == 0 or 0 < shown <= now < shown + self.size.steps // 10:
            return shown
        say(f"{name}: iteration {now} of {self.size.last(self.runs[name])}, loss {point['loss']:.4f}, {point['seconds']:.3f} s")
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
