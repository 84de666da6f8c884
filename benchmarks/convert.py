"""`python benchmarks/convert.py --folder FOLDER`: memory and speed of the converter, over a synthetic Llama of 10 GB and more.

Four processes on the CPU: `cp` of the files, hf-to-megatron, megatron-to-hf, verify. Anonymous memory (RssAnon) is read twenty
times a second, less what the same imports take in a process that does nothing else. The limit is three times the largest
tensor and 1 GiB, the bar of time twice that of the copy. Where others use the machine, seconds of CPU say more than the
clock. Needs four times the size of the model on disk, and leaves convert.json in --out. What it wrote to --folder is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.convert.families import llama
from megatron_lighthouse.convert.mapping import all_placed
from megatron_lighthouse.convert.safetensors_files import Stored, Tensors, write

LLAMA_8B: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False},
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
}
IMPORTS = {
    "hf-to-megatron": "import megatron_lighthouse.convert.to_megatron, safetensors",
    "megatron-to-hf": "import megatron_lighthouse.convert.to_hugging_face, safetensors",
    "verify": "import megatron_lighthouse.convert.verify, safetensors",
}
SECONDS = 0.05
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the files go; made, and removed at the end")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "convert")
    parser.add_argument("--layers", type=int, default=20, help="of Llama-3 8B's size, 0.44 GB each")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        found = measure(options.folder, options.layers)
    finally:
        shutil.rmtree(options.folder)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "convert.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def measure(folder: Path, layers: int) -> dict[str, Any]:
    """Seconds and memory of each process."""
    hf, copy, megatron, back = (folder / name for name in ("hf", "copy", "megatron", "back"))
    largest, total = synthetic(hf, {**LLAMA_8B, "num_hidden_layers": layers})
    limit = 3 * largest + GIB
    os.sync()
    copied = watched(["cp", "-r", str(hf), str(copy)])
    shutil.rmtree(copy)
    convert = [sys.executable, "-m", "megatron_lighthouse.convert"]
    runs = {}
    for name, given in {"hf-to-megatron": [hf, megatron], "megatron-to-hf": [megatron, back], "verify": [hf, back]}.items():
        imports = watched([sys.executable, "-c", IMPORTS[name] + "; import time; time.sleep(0.3)"])
        run = watched([*convert, name, *map(str, given)])
        anonymous = run["anonymous"] - imports["anonymous"]
        runs[name] = {
            "seconds": round(run["seconds"], 1),
            "cpu_seconds": round(run["cpu"], 1),
            "cpu_seconds_of_imports": round(imports["cpu"], 1),
            "gb_written": round(run["written"] / 1e9, 2),
            "times_the_copy": round(run["seconds"] / copied["seconds"], 2),
            "anonymous_gib": round(anonymous / GIB, 3),
            "within_limit": anonymous < limit,
        }
    return {
        "bytes": total,
        "largest_tensor_bytes": largest,
        "limit_gib": round(limit / GIB, 3),
        "copy_seconds": round(copied["seconds"], 1),
        "copy_cpu_seconds": round(copied["cpu"], 1),
        "runs": runs,
        "machine": machine(),
    }


def synthetic(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """A Hugging Face folder of random bf16; bytes of its largest tensor, and of all."""
    folder.mkdir()
    shapes = {name: s for one in all_placed(llama.FAMILY, config, tied=False) for name, s in one.parts.items()}
    noise = torch.randn(max(torch.Size(shape).numel() for shape in shapes.values()) + len(shapes), dtype=torch.bfloat16)

    def read(n: int, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        return lambda: noise[n : n + torch.Size(shape).numel()].reshape(shape)

    tensors = [Tensors(name, Stored(shape, torch.bfloat16), read(n, shape)) for n, (name, shape) in enumerate(shapes.items())]
    write(folder, tensors, 5_000_000_000, lambda count: None)
    (folder / "config.json").write_text(json.dumps(config))
    return max(t.bytes for t in tensors), sum(t.bytes for t in tensors)


def watched(command: Sequence[str]) -> dict[str, float]:
    """Runs it: seconds until its files are on the disk, its own, the most anonymous memory and what it wrote, in bytes."""
    start, most, written, before = time.perf_counter(), 0, 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command)
    while process.poll() is None:
        most = max([most, *(1024 * kib for kib in said_of(process.pid, "status", "RssAnon"))])
        written = max([written, *said_of(process.pid, "io", "write_bytes")])
        time.sleep(SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    os.sync()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu": cpu, "anonymous": most, "written": written}


def said_of(process: int, file: str, name: str) -> list[int]:
    """The number of that name in a file of /proc; none where the process is ending."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]


def machine() -> dict[str, Any]:
    """What the figures are of."""
    with open("/proc/meminfo") as memory:
        gib = int(memory.readline().split()[1]) / 2**20
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(gib, 1),
        "load_of_the_last_15_minutes": round(os.getloadavg()[2], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
