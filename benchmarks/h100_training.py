"""`python benchmarks/h100_training.py --out FOLDER`: is training on one GPU right? Not a measure of speed.

From one checkpoint, a 100M-class GPT trains 50 steps at 16K context in bf16 with Lighthouse and with dense attention, each
with Megatron's local implementation and with Transformer Engine; the first step is held to fp32 on the CPU, the
Transformer Engine checkpoints are resumed with the other attention, and `make train`'s recipe runs in short. The runs share
the GPU, so their times mean nothing. Leaves summary.json, losses.csv, losses.png and the recipe's two pictures.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_lighthouse import LighthouseConfig, lighthouse_attention, lighthouse_select
from megatron_lighthouse.launch.torchrun import ALONE
from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe.presets import COMMON, GPU, LOCAL, ON_CPU, default_text

ROOT = Path(__file__).resolve().parents[1]
STEPS = 50
NO_APEX = "--no-gradient-accumulation-fusion"
IMPLEMENTATIONS = {
    "local": f"{LOCAL} {NO_APEX}",
    "transformer_engine": f"--transformer-impl transformer_engine {NO_APEX}",
}
CPU = f"{LOCAL} {ON_CPU} --no-bias-swiglu-fusion"
DETERMINISTIC = {
    **{"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_ALGO": "Ring"},
    **{"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"},
}
"""What --deterministic-mode asks of the environment."""
START = "--finetune --no-load-optim --no-load-rng"
LOG_KEYS = "--dist-ckpt-strictness log_all"


class Bench:
    """Runs of the entry point, each in a folder of its own under `work`, with a log beside it."""

    def __init__(self, work: Path, out: Path, cpu_path: str) -> None:
        self.work, self.out, self.cpu_path = work, out, cpu_path
        work.mkdir(parents=True, exist_ok=True)

    def train(self, name: str, *options: str, cpu: bool = False) -> dict[int, float]:
        """Loss by iteration. Raises RuntimeError where the run fails."""
        model = (COMMON + GPU).replace("nccl --bf16", "gloo") if cpu else COMMON + GPU
        logs = self.work / name
        command = [
            *(sys.executable, "-m", "megatron_lighthouse.pretrain_gpt"),
            *model.split(),
            *("--global-batch-size", "1", "--eval-interval", "100000", "--tensorboard-dir", str(logs)),
            *("--data-cache-path", str(self.work / f"{name}-data")),
            *" ".join(options).split(),
            *("--eval-iters", "0", "--text-data", *default_text()),
        ]
        cpu_only = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "8", "PYTHONPATH": f"{ROOT}{os.pathsep}{self.cpu_path}"}
        seconds = self._run(name, command, cpu_only if cpu else {})
        steps, values = read_scalars(logs)["lm loss"]
        print(f"{name}: {seconds:.0f} s, loss {values[0]:.4f} at {steps[0]}, {values[-1]:.4f} at {steps[-1]}", flush=True)
        return {int(step): float(value) for step, value in zip(steps, values, strict=True)}

    def twice(self, implementation: str) -> dict[str, object]:
        """Whether ten iterations with Megatron's --deterministic-mode give the same losses, bit for bit, when run again."""
        given = "--attention lighthouse --train-iters 10 --deterministic-mode"
        names = [f"again-{number}-{implementation}" for number in (1, 2)]
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda name: self.train(name, given, IMPLEMENTATIONS[implementation]), names)
        return {f"ten iterations of {implementation} in --deterministic-mode, run twice: losses identical": first == second}

    def reported_keys(self, name: str) -> list[str]:
        """Keys that Megatron's log calls missing from the model, or unexpected by the checkpoint."""
        found = re.findall(r"(?:Missing|Unexpected) keys \(.*?\): \{(.*?)\}", (self.work / f"{name}.log").read_text())
        return sorted({key.strip(" '") for keys in found for key in keys.split(",")})

    def saved_keys(self, name: str) -> set[str]:
        """What the checkpoint of a run holds."""
        folder = self.work / f"{name}-saved" / f"iter_{STEPS:07}"
        return set(FileSystemReader(folder).read_metadata().state_dict_metadata)

    def recipe(self) -> list[str]:
        """The last lines of a short `make train`."""
        command = [sys.executable, "-m", "megatron_lighthouse.recipe.two_stage", "--runs", str(self.work)]
        self._run("recipe", [*command, "--name", "short", "--steps", "40", "--dense-steps", "20"], {})
        for picture in ("loss", "selection"):
            shutil.copy(self.work / "short" / f"{picture}.png", self.out / f"recipe-{picture}.png")
        return (self.work / "recipe.log").read_text().splitlines()[-4:]

    def _run(self, name: str, command: list[str], environment: dict[str, str]) -> float:
        single = ALONE
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if name == "recipe":  # torchrun sets these itself
            single = {}
        start = time.monotonic()
        with (self.work / f"{name}.log").open("w") as log:
            environment = {**os.environ, **paths, **single, **DETERMINISTIC, **environment}
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if status:
            print((self.work / f"{name}.log").read_text(errors="replace")[-3000:], flush=True)
            raise RuntimeError(f"{name} ended with status {status}")
        return time.monotonic() - start


def same_bits_twice() -> dict[str, object]:
    """The plain PyTorch steps on the GPU: two runs agree in every bit, and with the CPU in every index."""
    # for the inner attention: cuDNN adds by atomics in its backward unless it is told not to
    torch.use_deterministic_algorithms(True)
    config = LighthouseConfig(budget=2048)
    query, key, value, grad = (torch.randn(32768, 1, heads, 128).bfloat16() for heads in (8, 8, 8, 8))

    def once() -> list[torch.Tensor]:
        inputs = [x.cuda().requires_grad_() for x in (query, key, value)]
        out = lighthouse_attention(inputs[0], inputs[1], inputs[2], config)
        return [out, *torch.autograd.grad(out, inputs, grad.cuda())]

    equal = all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
    indices = torch.equal(lighthouse_select(query.cuda(), key.cuda(), config).cpu(), lighthouse_select(query, key, config))
    return {"two runs, output and gradients identical": equal, "indices equal to the CPU's": indices}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/h100_training"), help="checkpoints and data (about 10 GB)")
    parser.add_argument(
        "--cpu-path",
        default=os.environ.get("PYTHONPATH", ""),
        help="PYTHONPATH of the CPU runs: it must hide Transformer Engine",
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.work, options.out, options.cpu_path)
    start = str(options.work / "start")
    bench.train("start", "--attention dense --train-iters 1", IMPLEMENTATIONS["local"], f"--save {start} --save-interval 1")

    losses: dict[str, dict[int, float]] = {}

    def one(attention: str, implementation: str) -> None:
        save = f"--save {options.work}/{attention}-{implementation}-saved --save-interval {STEPS}"
        name = f"{attention}-{implementation}"
        given = f"--attention {attention} --train-iters {STEPS + 10} --exit-interval {STEPS} --load {start}"
        losses[name] = bench.train(name, given, START, IMPLEMENTATIONS[implementation], save)

    def reference(attention: str) -> None:
        given = f"--attention {attention} --train-iters 1 --load {start}"
        losses[f"{attention}-cpu-fp32"] = bench.train(f"{attention}-cpu-fp32", given, START, CPU, cpu=True)

    def resume(attention: str, other: str) -> None:
        saved = f"{options.work}/{other}-transformer_engine-saved"
        name = f"{attention}-from-{other}"
        given = f"--attention {attention} --train-iters {STEPS + 10} --load {saved} {LOG_KEYS}"
        losses[name] = bench.train(name, given, IMPLEMENTATIONS["transformer_engine"])

    attentions = ("lighthouse", "dense")
    with ThreadPoolExecutor(2) as cpu, ThreadPoolExecutor(3) as gpu:
        references = [cpu.submit(reference, a) for a in attentions]
        finish([gpu.submit(one, a, i) for i in ("transformer_engine", "local") for a in attentions])
        finish([gpu.submit(resume, "dense", "lighthouse"), gpu.submit(resume, "lighthouse", "dense")])
        recipe = bench.recipe()
        bits = {**same_bits_twice(), **bench.twice("local"), **bench.twice("transformer_engine")}
        finish(references)
    keys = {a: bench.saved_keys(f"{a}-transformer_engine") for a in attentions}
    checkpoints = {
        "keys of the lighthouse checkpoint": len(keys["lighthouse"]),
        "of these, _extra_state": sum("_extra_state" in key for key in keys["lighthouse"]),
        "keys in one checkpoint only": sorted(keys["lighthouse"] ^ keys["dense"]),
        "dense from lighthouse, missing or unexpected": bench.reported_keys("dense-from-lighthouse"),
        "lighthouse from dense, missing or unexpected": bench.reported_keys("lighthouse-from-dense"),
    }
    write(options.out, losses, {"checkpoints of transformer_engine": checkpoints, "bits": bits, "recipe": recipe})


def finish(jobs: list[Future[None]]) -> None:
    """Wait for `jobs`. Where one fails, end here, with every run that is under way: the machine is lent by the minute."""
    for job in as_completed(jobs):
        if job.exception():
            print(f"{job.exception()}", flush=True)
            os.killpg(0, signal.SIGTERM)


def write(out: Path, losses: dict[str, dict[int, float]], more: dict[str, object]) -> None:
    """summary.json, losses.csv and losses.png."""
    pairs = {a: (losses[f"{a}-local"], losses[f"{a}-transformer_engine"]) for a in ("lighthouse", "dense")}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformer-engine")}
    summary = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {**versions, "python": platform.python_version()},
        "all losses finite": all(math.isfinite(x) for run in losses.values() for x in run.values()),
        "first loss": {name: run[min(run)] for name, run in losses.items()},
        "last loss": {name: run[max(run)] for name, run in losses.items()},
        "first step, distance from the CPU in fp32": {
            name: abs(losses[name][1] - losses[f"{name.split('-')[0]}-cpu-fp32"][1])
            for name in losses
            if name.endswith(("-local", "-transformer_engine"))
        },
        "local against transformer_engine, greatest distance": {
            a: max(abs(x[i] - y[i]) for i in range(1, STEPS + 1)) for a, (x, y) in pairs.items()
        },
        "local against transformer_engine, mean distance": {
            a: sum(abs(x[i] - y[i]) for i in range(1, STEPS + 1)) / STEPS for a, (x, y) in pairs.items()
        },
        **more,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (out / "losses.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["iteration", *losses])
        for step in range(1, STEPS + 11):
            table.writerow([step, *(run.get(step, "") for run in losses.values())])
    plot(out / "losses.png", losses)
    print(json.dumps(summary, indent=2))


def plot(path: Path, losses: dict[str, dict[int, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, run in losses.items():
        if len(run) > 1:
            axes.plot(list(run), list(run.values()), label=name, linestyle="-" if name.startswith("lighthouse") else "--")
        else:
            axes.plot(list(run), list(run.values()), "o", label=name)
    axes.set(xlabel="iteration", ylabel="loss (nats per byte)", title="100M-class GPT, 16K context, one GPU, bf16")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
