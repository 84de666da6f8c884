"""How the kernels are launched: one small table, the same on every rank, and nothing tuned at run time.

What counts is that a thread moves 16 bytes at a time and has several loads under way; beyond that the shape of a block hardly
matters (tried on an H100 from 1 to 32 KB and 1 to 8 warps). So one line a step, for rows of any size.

A layer's launches are alike from iteration to iteration. Triton would find out each time which compiled kernel they need, at
more cost to the host than the launch itself: `Prepared` keeps it, by all that the choice hangs on, and by no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from megatron_lighthouse.sums import next_power_of_two


class Launch(NamedTuple):
    """One launch configuration."""

    rows: int
    """Rows of D elements that one program holds at a time; a power of two."""
    warps: int


# bytes that one program holds at a time, and its warps. collect: gather forward, scatter backward; spread: the other two,
# merge, placed, and Wall's gather
_BYTES = {"score": (16384, 4), "collect": (2048, 2), "spread": (4096, 4)}


@cache
def launch(step_name: str, dim: int, itemsize: int) -> Launch:
    """The launch of `step_name` (score, collect, spread) for rows of `dim` elements of `itemsize` bytes."""
    size, warps = _BYTES[step_name]
    return Launch(max(4, min(128, size // (padded(dim) * itemsize))), warps)


def padded(n: int) -> int:
    """The power of two that a kernel's block holds `n` elements in: at least 16."""
    return max(16, next_power_of_two(n))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is made for kernels, and slow on the host."""
    return -(-a // b)


LOG2_E = 1.4426950408889634
"""By which kernels scale what they take powers of 2 of, where powers of e are meant."""
_compiled: dict[tuple[Any, ...], dict[tuple[Any, ...], Any]] = {}
"""Compiled kernels: by kernel, the kinds of numbers, the values of all other arguments and the dtypes of tensors; then by
device, and which tensors are not aligned."""
DEFAULTS = {"enable_fp_fusion": True}
"""Options of the compiler where a step names none. Triton 3.9 warns that 3.10 will fuse no multiply-add unasked."""
RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
"""Triton's, to the minor number."""
DIRECT = RELEASE >= (3, 4)
"""Whether a compiled kernel is run as `Prepared` does it: so it is from Triton 3.4 on."""


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory that Triton writes descriptors for the bulk copy engine to."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Prepared:
    """A launch of a kernel, all but its tensors: what their dtypes, shapes and strides settle, a step settles once."""

    __slots__ = ("behind", "compiled", "constants", "grid", "kernel", "numbers", "options")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: tuple[int | tuple[int, ...], ...],
        constants: Mapping[str, float],
        **options: int | bool,
    ) -> None:
        """The kernel's parameters are tensors, always of the same dtypes, then numbers, then constants, in this order.

        Args:
            options: of the compiler, such as num_warps.
        """
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.options = DEFAULTS | options
        self.behind = *numbers, *constants.values()
        self.compiled: dict[Any, Any] | None = None

    def __call__(self, *tensors: Tensor) -> None:
        device = tensors[0].get_device()  # -1 under the interpreter
        if device >= 0 and device != torch._C._cuda_getDevice():  # the one on which Triton launches
            with torch.cuda.device(device):
                return self(*tensors)
        pointers, bits = [x.data_ptr() for x in tensors], 0
        for pointer in pointers:
            bits |= pointer
        if self.constants.get("BULK"):
            triton.set_allocator(_scratch)  # of this thread: backward has its own
        where = (device, *[not pointer & 15 for pointer in pointers]) if bits & 15 else device
        if self.compiled is None:
            self.compiled = self._known(tensors)
        compiled = self.compiled.get(where)
        if compiled is not None and not _has_hooks():
            stream = triton.runtime.driver.active.get_current_stream(device)
            how = stream, compiled.function, compiled.packed_metadata, None, None, None  # what hooks are told, and hooks: none
            compiled.run(*self.grid, *how, *pointers, *self.behind)
            return None
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
        if DIRECT and compiled is not None:  # the interpreter compiles nothing
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            assert names == list(self.constants), "the order of `Prepared`"
            self.compiled[where] = compiled
        return None

    def _known(self, tensors: Sequence[Tensor]) -> dict[Any, Any]:
        """The compiled kernels of all launches that are alike."""
        arguments = _kinds(self.numbers), *self.constants.values(), *self.options.values(), *[x.dtype for x in tensors]
        return _compiled.setdefault((id(self.kernel), *arguments), {})


def start(launches: Sequence[Prepared], tensors: Sequence[Tensor]) -> None:
    """One after the other, each of these tensors."""
    for launch in launches:
        launch(*tensors)


def enqueue(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor],
    numbers: tuple[int | tuple[int, ...], ...],
    constants: Mapping[str, float],
    **options: int | bool,
) -> None:
    """Launch a kernel: see `Prepared`."""
    Prepared(kernel, grid, numbers, constants, **options)(*tensors)


@lru_cache(4096)
def _kinds(numbers: tuple[int | tuple[int, ...], ...]) -> str:
    """What Triton's choice hangs on, of numbers: which are 1, multiples of 16, or longer than 32 bits."""
    flat = [n for x in numbers for n in (x if isinstance(x, tuple) else (x,))]
    return str([1 if n == 1 else (n % 16 == 0, n.bit_length() > 31) for n in flat])


def _has_hooks() -> bool:
    """Whether something, such as Triton's profiler, asks to be told of launches."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def prepare_windows(
    kernel: Any,
    strides: tuple[tuple[int, ...], ...],
    places: Sequence[int],
    sizes: tuple[int, ...],
    heads: tuple[int, ...],
    blocks: range,
    how: Launch,
    dim: int,
    **constants: int,
) -> Prepared:
    """A launch of a kernel of gather or scatter: of its tensors [·, B, ·, D], the places, and other tables.

    Args:
        strides: of the tensors.
        places: their shape, [B, G, pyramid length].
        sizes: (N, L, p, S, chunks).
        heads: H; the heads over which the grid runs, of all that the kernel knows; the first of them; and what else the kernel
            is told of heads.
        blocks: of each chunk.
        dim: D of those heads.
    """
    (batch, groups, entries), (length, levels, pooling, _, chunks) = places, sizes
    grid = len(blocks) * chunks, batch * heads[1], 1
    counts = (length // chunks, chunks, blocks.start, len(blocks), entries, *heads, groups)
    shape = {"D": dim, "BLOCK_D": padded(dim), "P": pooling, "L": levels, "BLOCK": how.rows}
    return Prepared(kernel, grid, (*strides, *counts), {**shape, **constants}, num_warps=how.warps)


def run[T](op: CustomOpDef, function: Callable[..., T], *args: object) -> T:
    """Call `op` where torch.compile traces, for which it is opaque; else its `function`, which costs the host far less."""
    return op(*args) if torch.compiler.is_compiling() else function(*args)


def last_contiguous(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Those of the first three dimensions, as kernels take them."""
    first, second, third = x.stride()[:3]
    return first, second, third


def laid_out(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], tuple[tuple[int, ...], ...]]:
    """`last_contiguous` and `strides` of tensors [·, ·, ·, D]."""
    strides = [x.stride() for x in tensors]
    for steps in strides:
        if steps[-1] != 1:
            tensors = [last_contiguous(x) for x in tensors]
            strides = [x.stride() for x in tensors]
            break
    return tensors, tuple([steps[:-1] for steps in strides])


def new_rows(x: Tensor, rows: int) -> Tensor:
    """Memory for [rows, ·, ·, D], else as x."""
    _, batch, heads, dim = x.shape
    return x.new_empty(rows, batch, heads, dim)


def new_strides(shape: Sequence[int]) -> tuple[int, int, int]:
    """`strides` of a new tensor of that shape, [·, B, H, D]."""
    _, batch, heads, dim = shape
    return batch * heads * dim, heads * dim, dim
