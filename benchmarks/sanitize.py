"""`python benchmarks/sanitize.py`: a small run of every kernel under compute-sanitizer's memcheck and racecheck.

Racecheck watches shared memory alone; what the kernels exchange through global memory (select) is held by barriers, and tested.
"""

from __future__ import annotations

import os
import subprocess
import sys

TOOLS = ("memcheck", "racecheck")
NAMES = [x for name in ("lighthouse", "parallax", "wall") for x in ("--kernel-name", f"kernel_substring={name}")]


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
    for attention in (small_parallax, small_wall):
        attention()
    print("small run done")


def small_parallax() -> None:
    """Forward and backward of Parallax: heads in groups, a window, documents, a last tile that is not full."""
    import torch

    from megatron_lighthouse.parallax.attention import parallax_attention

    bounds = torch.tensor([0, 100, 101, 300], dtype=torch.int32, device="cuda")
    for dim, options in ((128, {}), (64, {"window": 70}), (40, {"cu_seqlens": bounds})):
        rows = [torch.randn(300, 1, heads, dim, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2, 4)]
        q, k, v, r = (x.requires_grad_() for x in rows)
        out = parallax_attention(q, r, k, v, **options)
        out.backward(torch.randn_like(out))
        torch.cuda.synchronize()


def small_wall() -> None:
    """Likewise of Wall by its kernels, in pieces; and of the rows that Lighthouse gathers for it."""
    import torch

    from megatron_lighthouse import LighthouseConfig, lighthouse_attention
    from megatron_lighthouse.wall.cut import Step
    from megatron_lighthouse.wall.layer import build

    Step.TOKENS = 200
    for dim in (128, 64, 80):
        rows = [torch.randn(500, 1, heads, dim, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2, 4)]
        q, k, v, g = (x.requires_grad_() for x in rows)
        out = build(q, k, v, 4, kernels="triton")(q, k, v, -g.float().exp(), None, None)
        out.backward(torch.randn_like(out))
        torch.cuda.synchronize()
    config = LighthouseConfig(3, 4, 32, 16, around="wall")
    q, k, v, g = (torch.randn(2048, 1, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    out = lighthouse_attention(q, k, v, config, streams=[-g.float().exp()])
    out.backward(torch.randn_like(out))
    torch.cuda.synchronize()


def main() -> None:
    if "--run" in sys.argv:
        small_run()
        return
    failed = False
    for tool in TOOLS:
        # the cache of kernels is filled first: compiling under the sanitizer takes minutes
        subprocess.run([sys.executable, __file__, "--run"], check=True, stdout=subprocess.DEVNULL)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *NAMES]
        # without torch's cache of memory, so that every tensor has bounds of its own
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = [*command, sys.executable, __file__, "--run"]
        result = subprocess.run(run, capture_output=True, text=True, env=environment)
        print(f"{tool}: exit status {result.returncode}\n{result.stdout[-1500:]}{result.stderr[-500:]}", flush=True)
        failed |= bool(result.returncode)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
