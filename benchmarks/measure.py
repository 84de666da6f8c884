"""What the benchmarks share: time by CUDA events, and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def median_ms(calls: Sequence[Call], seconds: float = 0.4, most: int = 50) -> float:
    """Median milliseconds of one call, by CUDA events.

    Args:
        calls: the same work on different inputs, taken in turn, so that no cache holds them from one call to the next.
        seconds: how long to measure; at least three calls, or one where a single call takes longer than that.
    """
    first = _timed(calls[0])  # compiles, and picks algorithms
    if first < 1000 * seconds:
        for call in calls:
            call()
    times = [_timed(calls[0])]
    times += [_timed(calls[i % len(calls)]) for i in range(1, max(1, min(most, int(1000 * seconds / times[0]))))]
    return statistics.median(times)


def _timed(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # work in front of the first event, for the host to get ahead: what is measured is the GPU, not Python
    torch.cuda._sleep(3_000_000)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def host_ms(call: Call, repeats: int = 20) -> float:
    """Milliseconds from call to call when the GPU is never waited for between them: the larger of host and GPU time."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def peak_gib(call: Call) -> float:
    """GiB that `call` needs at its peak, above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def copy_gb_per_second() -> float:
    """A large device-to-device copy: gigabytes read and written per second. The ceiling of every step but the inner one."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms([lambda: target.copy_(source)]) / 1e6
