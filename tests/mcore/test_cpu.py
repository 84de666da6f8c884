"""The stand-in for CUDA: what it redirects, and that it stays away where CUDA is."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest

WITHOUT_CUDA = """
import torch
from megatron_lighthouse import cpu
assert cpu.install() and cpu.install()
assert not torch.cuda.is_available()
"""

CASES = {
    "factories and moves": """
x = torch.arange(3, device="cuda", dtype=torch.float32)
assert x.device.type == "cpu" and x.cuda().to("cuda").to(torch.device("cuda", 0)).to(device=0).pin_memory().device.type == "cpu"
assert torch.empty_like(x, device="cuda").device.type == x.new_zeros(2, device=0).device.type == "cpu"
assert torch.nn.Linear(2, 2).cuda(torch.cuda.current_device()).weight.device.type == "cpu"
assert torch.zeros(2, device="meta").device.type == "meta" and x.to(torch.float64).dtype == torch.float64
assert x.type() == "torch.cuda.FloatTensor" and x.type("torch.cuda.DoubleTensor").dtype == torch.float64
""",
    "generator states, also through names that Megatron imported": """
from torch.cuda import _lazy_call
from megatron.core.tensor_parallel.random import _get_cuda_rng_state, _set_cuda_rng_state
torch.manual_seed(3)
state = _get_cuda_rng_state()
first = torch.rand(4)
_set_cuda_rng_state(state)
assert torch.equal(torch.rand(4), first)
torch.cuda.manual_seed(3)
assert torch.equal(torch.rand(4), first)
""",
    "in other threads and in backward": """
import threading
seen = []
class Op(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2
    @staticmethod
    def backward(ctx, grad):
        seen.append(torch.zeros(1, device="cuda").device.type)
        return grad * 2
Op.apply(torch.ones(1, requires_grad=True)).sum().backward()
thread = threading.Thread(target=lambda: seen.append(torch.ones(1, device="cuda").device.type))
thread.start(); thread.join()
assert seen == ["cpu", "cpu"]
""",
    "streams and events": """
with torch.cuda.stream(torch.cuda.Stream()):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(); end.record()
torch.cuda.current_stream().wait_event(end)
torch.cuda.synchronize()
assert end.query() and start.elapsed_time(end) >= 0
""",
}

WITH_CUDA = """
import sys, types, torch
torch.cuda.is_available = lambda: True
from megatron_lighthouse import cpu
before = torch.zeros, torch.Tensor.to, torch.cuda.current_device
assert cpu.install() is False
assert before == (torch.zeros, torch.Tensor.to, torch.cuda.current_device)
"""

ENTRY_WITH_CUDA = """
import sys, types, torch
torch.cuda.is_available = lambda: True
ran = []
sys.modules["megatron_lighthouse.mcore.loop.pretrain"] = types.SimpleNamespace(run=ran.append)
from megatron_lighthouse import pretrain_gpt
pretrain_gpt.main()
assert ran and "megatron_lighthouse.cpu" not in sys.modules
"""

EACH = """
import json, os, sys, traceback
import torch
def each(cases):
    for code in json.loads(cases):
        if not os.fork():
            try:
                exec(code, globals())
            except BaseException:
                traceback.print_exc(file=sys.stdout)
                sys.stdout.flush()
                os._exit(1)
            os._exit(0)
        print("" if os.wait()[1] == 0 else "failed", "next", sep="", flush=True)
"""


@cache
def printed() -> dict[str, str]:
    """By case, the traceback of a process of its own, all forked from one interpreter, before the stand-in and with it."""
    code = f"{EACH}\neach(sys.argv[1])\n{WITHOUT_CUDA}\neach(sys.argv[2])"
    with_cuda, without = [WITH_CUDA, ENTRY_WITH_CUDA], [*CASES.values()]
    command = [sys.executable, "-c", code, json.dumps(with_cuda), json.dumps(without)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return dict(zip([*with_cuda, *without, "the end"], result.stdout.split("next\n"), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_without_cuda(case: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA, where the stand-in does nothing")
    assert not printed()[CASES[case]]


def test_nothing_changes_where_cuda_is() -> None:
    assert not printed()[WITH_CUDA]


def test_the_entry_point_does_not_import_it_where_cuda_is() -> None:
    assert not printed()[ENTRY_WITH_CUDA]
