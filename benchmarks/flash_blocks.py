"""`python benchmarks/flash_blocks.py --out FOLDER`: blocks of attention over shards, FlashAttention's beside cuDNN's, one GPU.

First each is held to plain PyTorch in float64, of the same rows: a rank's own block, one of an earlier and one of a later rank,
and a window, of rows that are slices of one projection, in bf16 and fp16. Then whether ten backwards repeat to the bit where
torch is asked for it. Then a pair of blocks at CP 2 is timed, forward and backward: of a rank's own rows, and of an earlier
rank's. One shape is checked first, then all are timed, then the others are checked: FlashAttention 4 compiles for minutes, and
`--within` ends it between two cases. Leaves flash_blocks.csv and .json. What is not installed is left out, and the reason said;
what fails is written down, and the status is 1. `--device cpu` tries the script, tiny, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from csv_tables import write_csv
from measure import median_ms
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Block, Mask, Part
from megatron_lighthouse.softmax.blocks import BLOCKS, Plain, block_for
from megatron_lighthouse.versions import environment

OWN, EARLIER, LATER = Mask((0, 1), (0, 1)), Mask((0, 1), (0,)), Mask((1,), (0, 1))
MOST = 2**-7
"""In norm, relative to float64: bf16 keeps 8 bits."""


class Shape(NamedTuple):
    """Of a rank's rows."""

    rows: int
    batch: int
    heads: int
    groups: int
    dim: int


class Case(NamedTuple):
    """A block."""

    title: str
    mask: Mask
    near: float
    """Rows, as a share of a rank's."""
    far: float
    window: int | None = None


CASES = [
    Case("own", OWN, 1, 1),
    Case("of an earlier rank", EARLIER, 1, 0.5),
    Case("of a later rank", LATER, 0.5, 1),
    Case("windowed", OWN, 0.5, 1, 300),
]
CHECKED = [Shape(2048, 2, 8, 2, 128), Shape(2000, 2, 4, 4, 64), Shape(1024, 1, 4, 2, 256)]
TIMED = [Shape(n, 1, 32, groups, 128) for n in (16384, 49152) for groups in (32, 8)]
TINY = [Shape(32, 2, 4, 2, 16)]

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""Query, key, value, and the gradient of the output."""


def rows_of(shape: Shape, case: Case, dtype: torch.dtype, device: str) -> Rows:
    """Slices of one projection, not contiguous."""
    ratio = shape.heads // shape.groups
    fused = torch.randn(shape.rows, shape.batch, shape.groups, ratio + 2, shape.dim, device=device, dtype=dtype)
    near, far = int(case.near * shape.rows), int(case.far * shape.rows)
    query = fused[-near:, :, :, :ratio].flatten(2, 3)
    return query, fused[-far:, :, :, ratio], fused[-far:, :, :, ratio + 1], torch.randn_like(query)


def forward(block: Block, case: Case, rows: Rows) -> Part:
    return block.forward(rows[:1], rows[1:3], case.mask)


def backward(block: Block, case: Case, rows: Rows, part: Part) -> list[Tensor]:
    near, far = block.backward(rows[3], rows[:1], rows[1:3], part, case.mask)
    return [*near, *far]


def block_of(name: str, shape: Shape, window: int | None, dtype: torch.dtype, device: str) -> Block:
    """Raises ValueError where it cannot run."""
    query, key = (torch.empty(1, 1, heads, shape.dim, dtype=dtype, device=device) for heads in (shape.heads, shape.groups))
    return block_for(name, query, key, shape.dim**-0.5, None, window)


def check(name: str, shape: Shape, case: Case, dtype: torch.dtype, device: str) -> dict[str, object]:
    """Errors in norm, and the largest of any element; the log-sum-exp's in units, not relative."""
    block, rows = block_of(name, shape, case.window, dtype, device), rows_of(shape, case, dtype, device)
    exact: Rows = (rows[0].double(), rows[1].double(), rows[2].double(), rows[3].double())
    plain, found = Plain(shape.dim**-0.5, case.window), forward(block, case, rows)
    expected = forward(plain, case, exact)
    pairs = zip(
        ("out", "dq", "dk", "dv"),
        (*found.averages, *backward(block, case, rows, found)),
        (*expected.averages, *backward(plain, case, exact, expected)),
        strict=True,
    )
    errors = {what: (x.double() - y, y) for what, x, y in pairs}
    norms = {what: float(f"{(e.norm() / y.norm()).item():.2e}") for what, (e, y) in errors.items()}
    largest = {f"largest {what}": float(f"{e.abs().max().item():.2e}") for what, (e, _) in errors.items()}
    lse = float(f"{(found.lse.double() - expected.lse).abs().max().item():.2e}")
    if not (all(x < MOST for x in norms.values()) and lse < 1e-3):
        raise ArithmeticError(f"{norms}, log-sum-exp {lse}: {MOST} and 1e-3 are allowed")
    return {**norms, **largest, "lse": lse}


def repeats(name: str, shape: Shape, case: Case, device: str) -> bool:
    """Whether ten backwards give the same bits where torch is asked for it."""
    torch.use_deterministic_algorithms(True)
    try:
        block, rows = block_of(name, shape, case.window, torch.bfloat16, device), rows_of(shape, case, torch.bfloat16, device)
        part = forward(block, case, rows)
        first = backward(block, case, rows, part)
        again = [backward(block, case, rows, part) for _ in range(10)]
    finally:
        torch.use_deterministic_algorithms(False)
    return all(torch.equal(x, y) for other in again for x, y in zip(other, first, strict=True))


def times(name: str, shape: Shape, deterministic: bool) -> dict[str, object]:
    """Milliseconds of a hop's pair at CP 2: a rank's own block, and that of an earlier rank."""
    torch.use_deterministic_algorithms(deterministic)
    calls: dict[str, list[Callable[[], object]]] = {"forward": [], "backward": []}
    try:
        block = block_of(name, shape, None, torch.bfloat16, "cuda")
        for _ in range(2):
            given = [(case, rows_of(shape, case, torch.bfloat16, "cuda")) for case in CASES[:2]]
            kept = [(case, rows, forward(block, case, rows)) for case, rows in given]
            calls["forward"].append(partial(each, partial(forward, block), given))
            calls["backward"].append(partial(each, partial(backward, block), kept))
        found = {f"{what}_ms": median_ms(of) for what, of in calls.items()}
    finally:
        torch.use_deterministic_algorithms(False)
    found["both_ms"] = sum(found.values())
    ms = {what: round(x, 4) for what, x in found.items()}
    return {"backend": name, **shape._asdict(), "deterministic": deterministic, **ms}


def each(function: Callable[..., Any], given: list[Any]) -> None:
    for one in given:
        function(*one)


class Record:
    """What was found, written as it comes, and what failed."""

    def __init__(self, out: Path, within: float) -> None:
        self.out, self.until = out, time.monotonic() + within
        self.checks: dict[str, object] = {}
        self.rows: list[dict[str, object]] = []
        self.failed: list[str] = []
        self.left: list[str] = []

    def taken(self, name: str, what: str, call: Callable[[], object]) -> object:
        """What a call of one backend answers; or why it does not. A backend that fails does so in ways of its own."""
        if time.monotonic() > self.until:
            self.left.append(what)
            return "no time was left"
        try:
            return call()
        except ValueError as error:
            return f"{name} is left out: {error}"
        except Exception as error:
            self.failed.append(what)
            return f"failed: {type(error).__name__}: {str(error)[:600]}"

    def check(self, name: str, shape: Shape, device: str) -> None:
        """By case."""
        half = (torch.bfloat16, torch.float16) if shape == CHECKED[0] else (torch.bfloat16,)
        for case in CASES:
            key = f"{name}, {case.title}, {shape.heads}/{shape.groups} heads of {shape.dim}"
            calls: dict[str, Callable[[], object]] = {
                f"{key}, {str(dtype).removeprefix('torch.')}": partial(check, name, shape, case, dtype, device)
                for dtype in (half if device == "cuda" else (torch.float32,))
            }
            if device == "cuda":
                calls[f"{key}, repeats"] = partial(repeats, name, shape, case, device)
            for what, call in calls.items():
                self.checks[what] = self.taken(name, what, call)
                print(f"{what}: {self.checks[what]}", flush=True)
            self.write()

    def time(self, name: str, shape: Shape, deterministic: bool) -> None:
        what = f"time of {name}, {shape}" + (", deterministic" if deterministic else "")
        found = self.taken(name, what, partial(times, name, shape, deterministic))
        print(f"{what}: {found}", flush=True)
        if isinstance(found, dict):
            self.rows.append(found)
        else:
            self.checks[what] = found
        self.write()

    def write(self) -> None:
        (self.out / "flash_blocks.json").write_text(json.dumps({**environment(), "checks": self.checks}, indent=2) + "\n")
        if self.rows:
            write_csv(self.out / "flash_blocks.csv", self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("flash_blocks"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--backends", nargs="+", choices=list(BLOCKS))
    parser.add_argument("--within", type=float, default=math.inf, metavar="SECONDS")
    options = parser.parse_args()
    names = options.backends or (["fa4", "fa3", "cudnn", "fa2"] if options.device == "cuda" else ["sdpa"])
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out, options.within)
    first, *others = CHECKED if options.device == "cuda" else TINY
    for name in names:
        record.check(name, first, options.device)
    for shape in TIMED if options.device == "cuda" else []:
        for name, deterministic in ((name, asked) for asked in (False, True) for name in names):
            record.time(name, shape, deterministic)
    for shape in others:
        for name in names:
            record.check(name, shape, options.device)
    if record.failed or record.left:
        raise SystemExit(f"failed: {'; '.join(record.failed)}; without time: {'; '.join(record.left)}")


if __name__ == "__main__":
    main()
