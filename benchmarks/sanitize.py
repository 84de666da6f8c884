"""`python benchmarks/sanitize.py [CASE …]`: a small run of every kernel under compute-sanitizer's memcheck and racecheck.

--list names the cases; --run runs them without compute-sanitizer, on a GPU, or with TRITON_INTERPRET=1 on a CPU.
Racecheck watches shared memory alone; what the kernels exchange through global memory (select) is held by barriers, and tested.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TOOLS = ("memcheck", "racecheck")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
HEADS, GROUPS = 4, 2
BOUNDS = (0, 100, 101, 300)
"""Of documents, one of a single token."""


def lighthouse(n: int, levels: int, pooling: int, budget: int, tile_budget: int, h: int, g: int, d: int) -> None:
    """Each kernel once, forward and backward; compares selections with the reference."""
    import torch

    from megatron_lighthouse import LighthouseConfig
    from megatron_lighthouse.kernels import lighthouse as kernels
    from megatron_lighthouse.lighthouse import reference

    geometry = LighthouseConfig(levels, pooling, budget, tile_budget).geometry(n)
    q, k, v = (rows(n, x, d, torch.bfloat16).requires_grad_() for x in (h, g, g))
    selection = kernels.select(kernels.score(q, k, geometry), geometry, True)
    expected = reference.select(reference.score(q, k, geometry), geometry, True)
    assert torch.equal(selection.places, expected.places)
    causal = kernels.select(kernels.score(q, k, geometry), geometry, True, True)
    assert torch.equal(causal.scattered, reference.select(reference.score(q, k, geometry), geometry, True, True).scattered)
    gathered = kernels.gather(q, k, v, selection)
    out = kernels.scatter(gathered[0], selection)
    torch.autograd.backward([out, *gathered[1:]], [torch.randn_like(x) for x in (out, *gathered[1:])])


def parallax(dim: int, dtype: str, **options: Any) -> None:
    """Forward and backward: heads in groups, a last tile that is not full."""
    from megatron_lighthouse.parallax.layer import build

    q, r, k, v = given(300, dim, dtype)
    if bounds := options.get("cu_seqlens"):
        options["cu_seqlens"] = q.new_tensor(bounds).int()
    finite(build(q, k, kernels="triton", **options)(q, r, k, v), q, r, k, v)


def wall(dim: int, dtype: str, bounds: tuple[int, ...] = (), window: int | None = None, scalar: bool = False) -> None:
    """Likewise, in pieces of 128 tokens, of which the last is not full."""
    from megatron_lighthouse.wall.cut import Step
    from megatron_lighthouse.wall.gates import LogSigmoid
    from megatron_lighthouse.wall.layer import build
    from megatron_lighthouse.wall.pieces import Sight

    q, logits, k, v = given(300, dim, dtype)
    more = [rows(300, HEADS, 1, q.dtype).requires_grad_()] if scalar else []
    step, Step.TOKENS = Step.TOKENS, 128 * (1 if bounds else Step.SHORTER)
    attend = build(q, k, v, HEADS, sight=Sight(bounds, window), kernels="triton", biased=scalar)
    gate, *scalars = (LogSigmoid()(x) for x in (logits, *more))
    out = attend(q, k, v, gate, scalars[0] if scalar else None, None)
    Step.TOKENS = step
    finite(out, q, logits, k, v, *more)


def around(name: str, dtype: str) -> None:
    """Lighthouse around another attention, whose rows it gathers."""
    from megatron_lighthouse import LighthouseConfig, lighthouse_attention
    from megatron_lighthouse.variants import VARIANTS

    q, stream, k, v = given(512, 64, dtype)
    variant, config = VARIANTS[name], LighthouseConfig(3, 4, 8, 4, steps="kernels", around=name)
    assert variant.config is not None
    own = variant.config(kernels="triton")
    streams = variant.of_projections(own, (stream,))
    finite(lighthouse_attention(q, k, v, config, streams=streams, around=own), q, stream, k, v)


def rows(tokens: int, heads: int, dim: int, dtype: Any) -> Tensor:
    import torch

    return torch.randn(tokens, 1, heads, dim, device=DEVICE, dtype=dtype)


def given(tokens: int, dim: int, dtype: str) -> list[Tensor]:
    """Queries, a stream like them, keys and values."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    return [rows(tokens, heads, dim, kind).requires_grad_() for heads in (HEADS, HEADS, GROUPS, GROUPS)]


def finite(out: Tensor, *inputs: Tensor) -> None:
    """Backward; every output and gradient is a number, but in bf16 under the interpreter, which multiplies its bits."""
    import torch

    out.backward(torch.randn_like(out))
    found = [out, *(x.grad for x in inputs)]
    if DEVICE == "cuda" or out.dtype == torch.float32:
        assert all(x is not None and bool(x.isfinite().all()) for x in found)


# N, L, p, k, m, H, G, D: windows larger than a block of scores, tiles larger than a block of keys, p = 3, odd D
SELECTIONS = (
    (2048, 3, 4, 32, 16, 4, 2, 64),
    (1440, 3, 3, 32, 16, 2, 1, 40),
    (2048, 5, 4, 8, 4, 1, 1, 256),
    (16384, 2, 2, 8, 8, 1, 1, 32),
)
CASES: dict[str, Callable[[], None]] = {
    **{f"lighthouse-{sizes[0]}-{sizes[-1]}": partial(lighthouse, *sizes) for sizes in SELECTIONS},
    **{f"parallax-{dim}-{dtype}": partial(parallax, dim, dtype) for dim in (40, 64, 128) for dtype in ("bf16", "fp32")},
    "parallax-window": partial(parallax, 64, "bf16", window=70),
    "parallax-documents": partial(parallax, 128, "bf16", cu_seqlens=BOUNDS),
    **{f"wall-{dim}-{dtype}": partial(wall, dim, dtype) for dim in (64, 80, 128) for dtype in ("bf16", "fp32")},
    "wall-window": partial(wall, 64, "bf16", window=70),
    "wall-documents": partial(wall, 128, "bf16", BOUNDS),
    "wall-scalar": partial(wall, 64, "fp32", scalar=True),
    **{f"around-{name}": partial(around, name, "bf16") for name in ("parallax", "wall")},
}


def run(names: list[str]) -> None:
    import torch

    for name in names:
        CASES[name]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: done", flush=True)


def sanitized(names: list[str]) -> bool:
    """Whether both tools find nothing."""
    command = [sys.executable, __file__, "--run", *names]
    of_kernels = [x for name in ("lighthouse", "parallax", "wall") for x in ("--kernel-name", f"kernel_substring={name}")]
    # without torch's cache of memory, so that every tensor has bounds of its own
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # the cache of kernels is filled first: compiling under the sanitizer takes minutes
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    clean = True
    for tool in TOOLS:
        under = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *of_kernels, *command]
        result = subprocess.run(under, capture_output=True, text=True, env=environment)
        print(f"{tool}: exit status {result.returncode}\n{result.stdout[-1500:]}{result.stderr[-500:]}", flush=True)
        clean &= not result.returncode
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="or the beginning of some, as 'wall'; default: all")
    parser.add_argument("--list", action="store_true", help="name the cases, and stop")
    parser.add_argument("--run", action="store_true", help="without compute-sanitizer")
    options = parser.parse_args()
    names = [name for name in CASES if name.startswith(tuple(options.cases) or "")]
    if unknown := [case for case in options.cases if not any(name.startswith(case) for name in CASES)]:
        parser.error(f"{' '.join(unknown)}: no case begins so; use some of {', '.join(CASES)}")
    if options.list:
        print("\n".join(names))
        return 0
    if options.run:
        run(names)
        return 0
    return 0 if sanitized(names) else 1


if __name__ == "__main__":
    sys.exit(main())
