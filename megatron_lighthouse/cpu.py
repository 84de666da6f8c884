"""A stand-in for CUDA, so that Megatron trains on a machine without a GPU. For tests, laptops and CI.

`install()` makes torch's own CUDA entry points act on the CPU: factories and moves to "cuda" stay on the CPU, the CUDA
random-number generator is the CPU's, streams and events are in order already. It changes torch alone, never Megatron,
does nothing where CUDA exists, and is never imported on a GPU run. `torch.cuda.is_available()` keeps saying the truth.

It patches functions rather than use a TorchFunctionMode, which is inactive in autograd's backward and in other threads.
Import it before Megatron: modules that did `from torch.cuda import …` earlier keep the originals. Ours.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch

FACTORIES = (
    "arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace logspace normal ones ones_like "
    "rand rand_like randint randint_like randn randn_like randperm tensor tril_indices triu_indices zeros zeros_like"
).split()
NEW = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros".split()
TYPES = "BFloat16 Bool Byte Char Double Float Half Int Long Short".split()

_installed = False


def install() -> bool:
    """Redirect torch's CUDA calls to the CPU; answers whether the stand-in is in place. Idempotent."""
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    # compiling for one CPU test run costs more than it saves, and dynamo must list torch.cuda before it changes
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    # Megatron asks for it below compute capability 10, where it orders kernels on a GPU
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in NEW:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    _patch_moves()
    _patch_cuda()
    _installed = True
    return True


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, int):  # torch reads a bare number as the index of a GPU
        return True
    return str(device).startswith("cuda") if isinstance(device, (str, torch.device)) else False


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with device="cuda" read as the CPU, and pin_memory dropped."""

    @wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return redirected


def _patch_moves() -> None:
    tensor, to, type_ = torch.Tensor, torch.Tensor.to, torch.Tensor.type

    @wraps(to)
    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return to(self, *args, **kwargs)

    @wraps(type_)
    def typed(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:  # Megatron asserts that gradients are torch.cuda.FloatTensor
            return type_(self).replace("torch.", "torch.cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return type_(self, dtype, *args, **kwargs)

    tensor.to = moved  # type: ignore[method-assign,assignment]
    tensor.type = typed  # type: ignore[method-assign,assignment]
    tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]
    tensor.is_pinned = lambda self, *_, **__: False  # type: ignore[method-assign]
    tensor.record_stream = lambda self, *_: None  # type: ignore[method-assign]


class Stream:
    """The CPU's one stream: everything in it has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cpu")
        self.cuda_stream = 0

    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Event:
    """A moment on the CPU's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = 0.0

    def record(self, *_: Any) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds until `end`."""
        return (end.seconds - self.seconds) * 1000

    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _patch_cuda() -> None:
    cuda: Any = torch.cuda
    stream = Stream()

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def call_now(function: Callable[[], Any], **_: Any) -> None:
        # torch would queue it until CUDA starts, which never happens: the state of a generator would be lost
        function()

    def nothing(*_: Any, **__: Any) -> None: ...

    def zero(*_: Any, **__: Any) -> int:
        return 0

    cuda.get_rng_state = cuda.random.get_rng_state = get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_rng_state
    for name in ("manual_seed", "manual_seed_all"):  # not torch.manual_seed, which calls them
        for module in (cuda, cuda.random):
            setattr(module, name, torch.default_generator.manual_seed)
    cuda.default_generators = (torch.default_generator,)
    cuda._lazy_call, cuda._lazy_init = call_now, nothing
    cuda.current_device, cuda.device_count = zero, lambda: 1
    cuda.set_device = cuda.synchronize = cuda.empty_cache = cuda.ipc_collect = cuda.set_stream = nothing
    cuda.reset_peak_memory_stats = cuda.reset_max_memory_allocated = nothing
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.stream = cuda.device = lambda *_: nullcontext()
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, zero)
    cuda.memory_stats = lambda *_: defaultdict(int)
    cuda.mem_get_info = lambda *_: (0, 0)
    cuda.get_device_name = lambda *_: "CPU"
    cuda.get_device_capability = lambda *_: (0, 0)
    properties = SimpleNamespace(name="CPU", major=0, minor=0, total_memory=0, multi_processor_count=1)
    cuda.get_device_properties = lambda *_: properties
    cuda.nvtx.range_push = cuda.nvtx.range_pop = cuda.nvtx.mark = zero
    for name in TYPES:
        setattr(cuda, name + "Tensor", getattr(torch, name + "Tensor"))
