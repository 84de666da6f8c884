"""What is launched when a compiled kernel is called without Triton's own search for it: the same, with the same arguments.

In a process of its own, for tests run under Triton's interpreter: kernels are compiled for a GPU whose driver only takes notes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch

from megatron_lighthouse.kernels.launch import Prepared

SCRIPT = """
import json, sys
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget

notes, addresses, told = [], [], []

class Launcher:
    def __init__(self, source, metadata):
        self.name, kinds = metadata.name, source.signature.values()
        self.pointers = [isinstance(kind, str) and kind.startswith("*") for kind in kinds]

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        addresses.append([a.data_ptr() if isinstance(a, torch.Tensor) else a for a, p in zip(args, self.pointers) if p])
        others = [list(a) if isinstance(a, tuple) else a for a, p in zip(args, self.pointers) if not p]
        notes.append([self.name, function, [x, y, z], [a % 16 for a in addresses[-1]], others])
        told.append(bool(getattr(enter, "calls", enter)))

functions = iter(range(1, 10**6))
driver = SimpleNamespace(
    utils=SimpleNamespace(
        load_binary=lambda *_: (object(), next(functions), 64, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 232448},
        unload_module=lambda _: None,
    ),
    launcher_cls=Launcher,
    get_current_device=lambda: 0,
    get_current_stream=lambda _: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
)
triton.runtime.driver.set_active(driver)

from megatron_lighthouse.kernels import launch, lighthouse as kernels
from megatron_lighthouse.kernels.lighthouse.edge import edge
from megatron_lighthouse.kernels.merge import merge
from megatron_lighthouse.lighthouse.geometry import Geometry

def one(offset=0, length=128):
    notes.clear()
    x = torch.zeros(length * 2 * 2 * 16 + 8, dtype=torch.bfloat16)[offset : offset + length * 2 * 2 * 16].view(length, 2, 2, 16)
    q, k, v = (x.clone() if offset == 0 else x for _ in range(3))
    geometry = Geometry(length, 3, 2, 8, 4)
    selection = kernels.select(kernels.score(q, k, geometry), geometry, True)
    leaves = [y.detach().requires_grad_() for y in (q, k, v)]
    rows = kernels.gather(*leaves, selection)
    out = kernels.scatter(rows[0] + rows[1] + rows[2], selection)
    torch.autograd.grad(out, leaves, torch.zeros_like(out))
    kernels.attended_norms(q, k, v, None)
    edge(rows[0].detach(), selection.places, selection.sizes)
    lse = torch.zeros(2, 2, length)
    merge(q.clone(), lse, k, lse.clone())
    return [*notes]

def kept():
    return sum(map(len, launch._compiled.values()))

def forget():
    for compiled in launch._compiled.values():
        compiled.clear()

by_triton, direct = one(), one()
found = {"by Triton": by_triton, "direct": direct, "kept": kept()}
forget()
launch.DIRECT = False
found["by Triton again"] = one()
launch.DIRECT = True
one()
found["unaligned"], found["longer"] = one(offset=4), one(length=256)

def merged(lengths):
    notes.clear()
    for length in lengths:
        x, lse = torch.zeros(length, 2, 2, 16, dtype=torch.bfloat16), torch.zeros(2, 2, length)
        merge(x, lse, x, lse)
    return [function for _, function, *_ in notes]

lengths = [1, *range(48, 100)]
forget()
found["of lengths"], found["kept of lengths"] = merged(lengths), kept()
found["of lengths directly"] = merged(lengths)
launch.DIRECT = False
forget()
found["of lengths by Triton"] = merged(lengths)
launch.DIRECT = True

x, lse = torch.zeros(4, 64, 2, 2, 16), torch.zeros(4, 2, 2, 64)
addresses.clear()
for _ in range(2):
    merge(x[0], lse[1], x[2], lse[3])
found["addresses"] = addresses[:]
told.clear()
merge(x[0], lse[1], x[2], lse[3])
triton.knobs.runtime.launch_enter_hook.add(print)
merge(x[0], lse[1], x[2], lse[3])
triton.knobs.runtime.launch_enter_hook.remove(print)
merge(x[0], lse[1], x[2], lse[3])
found["told"] = told
print(json.dumps(found))
"""


@cache
def launched() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def test_kernels_are_kept_and_called_as_triton_calls_them() -> None:
    found = launched()
    assert found["kept"] == len(found["by Triton"]) == 10
    assert found["direct"] == found["by Triton"] == found["by Triton again"]


@pytest.mark.parametrize(("change", "differ"), [("unaligned", 4), ("longer", 0)])
def test_other_inputs_take_the_kernels_that_triton_chooses_for_them(change: str, differ: int) -> None:
    """Pointers that are not aligned to 16 bytes need other machine code; longer inputs the same, with other arguments."""
    found = launched()
    pairs = list(zip(found[change], found["direct"], strict=True))
    assert sum(function != other for (_, function, *_), (_, other, *_) in pairs) >= differ
    assert [name for name, *_ in found[change]] == [name for name, *_ in found["direct"]]
    assert found[change] != found["direct"]


def test_kernels_are_kept_by_the_kinds_of_numbers_that_triton_tells_apart() -> None:
    """Of 53 lengths: 1, multiples of 16, of 8, and others; each gets what Triton takes for it."""
    found = launched()
    assert found["of lengths"] == found["of lengths directly"] == found["of lengths by Triton"]
    assert len(set(found["of lengths"])) == found["kept of lengths"] == 4


def test_addresses_are_those_of_the_tensors() -> None:
    by_triton, direct = launched()["addresses"]
    assert by_triton == direct
    assert len(set(direct)) == 4


def test_who_asks_to_be_told_of_launches_is_told() -> None:
    assert launched()["told"] == [False, True, False]


@pytest.mark.parametrize(("asked", "fused"), [({}, True), ({"enable_fp_fusion": False}, False)], ids=str)
def test_each_launch_says_whether_multiply_adds_are_fused(asked: dict[str, bool], fused: bool) -> None:
    """Triton 3.10 will not fuse them unasked."""
    given: dict[str, Any] = {}
    kernel = {(1, 1, 1): lambda *_, **options: given.update(options)}
    Prepared(kernel, (1, 1, 1), (), {}, num_warps=1, **asked)(torch.zeros(1))
    assert given == {"num_warps": 1, "enable_fp_fusion": fused}
