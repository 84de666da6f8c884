"""`python benchmarks/sanitize.py`: a small run of every kernel under compute-sanitizer's memcheck and racecheck.

Racecheck watches shared memory alone; what the kernels exchange through global memory (select) is held by barriers, and tested.
"""

from __future__ import annotations

import os
import subprocess
import sys

TOOLS = ("memcheck", "racecheck")


def small_run() -> None:
    """Each kernel once, forward and backward, at shapes that take every branch; compares with the reference."""
    import torch

    from megatron_lighthouse import LighthouseConfig
    from megatron_lighthouse.kernels import lighthouse as kernels
    from megatron_lighthouse.lighthouse import reference

    # N, L, p, k, m, H, G, D: windows larger than a block of scores, tiles larger than a block of keys, p = 3, odd D
    for n, levels, pooling, budget, tile_budget, h, g, d in (
        (2048, 3, 4, 32, 16, 4, 2, 64),
        (1440, 3, 3, 32, 16, 2, 1, 40),
        (2048, 5, 4, 8, 4, 1, 1, 256),
        (16384, 2, 2, 8, 8, 1, 1, 32),
    ):
        geometry = LighthouseConfig(levels, pooling, budget, tile_budget).geometry(n)
        q, k, v = (torch.randn(n, 1, x, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for x in (h, g, g))
        selection = kernels.select(kernels.score(q, k, geometry), geometry, True)
        expected = reference.select(reference.score(q, k, geometry), geometry, True)
        assert torch.equal(selection.places, expected.places)
        causal = kernels.select(kernels.score(q, k, geometry), geometry, True, True)
        assert torch.equal(causal.scattered, reference.select(reference.score(q, k, geometry), geometry, True, True).scattered)
        rows = kernels.gather(q, k, v, selection)
        out = kernels.scatter(rows[0], selection)
        torch.autograd.backward([out, *rows[1:]], [torch.randn_like(x) for x in (out, *rows[1:])])
        torch.cuda.synchronize()
    print("small run done")


def main() -> None:
    if "--run" in sys.argv:
        small_run()
        return
    failed = False
    for tool in TOOLS:
        # the cache of kernels is filled first: compiling under the sanitizer takes minutes
        subprocess.run([sys.executable, __file__, "--run"], check=True, stdout=subprocess.DEVNULL)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=lighthouse"]
        # without torch's cache of memory, so that every tensor has bounds of its own
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = [*command, sys.executable, __file__, "--run"]
        result = subprocess.run(run, capture_output=True, text=True, env=environment)
        print(f"{tool}: exit status {result.returncode}\n{result.stdout[-1500:]}{result.stderr[-500:]}", flush=True)
        failed |= bool(result.returncode)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
