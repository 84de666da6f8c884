"""The inner attention: plain causal attention over the gathered rows, by the fastest backend that is there.

Chosen once for a device, dtype and head dimension, and said once. Where torch is asked to be deterministic (and not only to
warn), only backends whose backward repeats to the bit are taken: cuDNN's in torch does not.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lighthouse.notice import say_once
from megatron_lighthouse.softmax.names import (
    EQUAL_IF_GROUPED,
    FLASH_DIMS,
    NARROWER,
    REPEATS_TO,
    shards_problem,
    te_problem,
    untried,
)
from megatron_lighthouse.softmax.rows import DOCUMENTS, SHARDS, RowKind
from megatron_lighthouse.versions import LEAST, too_old

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention over the gathered rows: ([S, B, H, D], [S, B, G, D], [S, B, G, D]) -> [S, B, H, D]."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the inner attention."""

    title: str
    problem: Callable[[RowKind], str | None]
    """Why it cannot take these rows, as the end of a sentence; None where it can."""
    attend: Callable[..., Tensor]
    """Of query, key, value, and the softmax scale or None; over documents, of these too."""
    repeats: Callable[[RowKind], bool] = lambda rows: True
    """Whether its backward of these rows gives the same bits again, when torch is asked to be deterministic."""


def inner_attention(
    name: str, query: Tensor, key: Tensor, softmax_scale: float | None = None, value_dim: int | None = None
) -> Attend:
    """The backend `name` of BACKENDS for these rows, or the fastest for 'auto'.

    Args:
        query: [S, B, H, D]; key: [S, B, G, D]; of these only shapes, dtype and device count.
        softmax_scale: 1/sqrt(D) by default.
        value_dim: of the values, where it is not D.

    Raises:
        ValueError: a backend that is forced and is not there, or cannot take these rows.
    """
    chosen = choose(name, query.device, query.dtype, query.shape[2], key.shape[2], query.shape[3], value_dim)
    attend = BACKENDS[chosen].attend
    return lambda q, k, v: attend(q, k, v, softmax_scale)


def choose(
    name: str, device: torch.device, dtype: torch.dtype, heads: int, groups: int, dim: int, value_dim: int | None = None
) -> str:
    """The name in BACKENDS that `name` stands for; says it the first time.

    Raises:
        ValueError: as `inner_attention`.
    """
    return _choose(name, RowKind(device, dtype, heads, groups, dim, value_dim or dim), deterministic())


# all that torch._dynamo.assume_constant_result does; to import that would double the time that this package takes to import
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def deterministic() -> bool:
    """Whether torch is asked for algorithms that repeat. With `warn_only` it takes others too, and so do we."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def choose_for_blocks(name: str, known: Sequence[str], rows: RowKind, over: str = SHARDS) -> str:
    """As `choose`, among the backends `known` that return their log-sum-exp: shards are merged by it, and sinks enter by it.

    'auto' takes none that is `untried`.

    Raises:
        ValueError: as `inner_attention`, or a backend that is forced and is not among those.
    """
    if problem := shards_problem(name, known, rows.dim):
        raise ValueError(problem)
    major, dims, alone = rows.capability // 10, (rows.dim, rows.value_dim), name != "auto"
    fits = [o for o in known if (alone or not untried(o, major, dims)) and shards_problem(o, known, rows.dim) is None]
    return _choose(name, rows, deterministic(), tuple(fits), over)


def choose_for_documents(name: str, rows: RowKind) -> str:
    """As `choose`, among the backends that attend over documents.

    Raises:
        ValueError: as `inner_attention`.
    """
    return _choose(name, rows, deterministic(), (), DOCUMENTS)


@cache
def _choose(name: str, rows: RowKind, deterministic: bool, known: tuple[str, ...] = (), over: str = "") -> str:
    backends = FAMILIES[over]
    if problem := te_problem(name):
        raise ValueError(problem)
    candidates = [other for other in _fastest_first(rows) if not known or other in known]
    problems = {other: _problem(backends[other], rows, deterministic) for other in candidates}
    fits = [other for other, problem in problems.items() if problem is None]
    if name == "auto":
        name = fits[0]
        passed = "; ".join(
            f"{backends[other].title} {problems[other]}" for other in list(problems)[: list(problems).index(name)]
        )
        why = f" ({passed})" if passed and rows.capability else ""
        say_once(f"lighthouse: the inner attention {over}of {rows} is {backends[name].title}{why}.")
    elif problems[name] is not None:
        raise ValueError(
            f"config.inner {name} cannot run: {backends[name].title} {problems[name]}. For {rows} use "
            f"config.inner {' or '.join(['auto', *fits])}."
        )
    return name


def _problem(backend: Backend, rows: RowKind, deterministic: bool) -> str | None:
    if deterministic and not backend.repeats(rows):
        return "is not deterministic, and torch.use_deterministic_algorithms is on"
    return backend.problem(rows)


def _fastest_first(rows: RowKind) -> list[str]:
    """All backends; on Hopper and Blackwell as `benchmarks/attention.py` and their authors measured them."""
    if rows.capability >= 90:
        return ["fa4", "fa3", "cudnn", "fa2", "sdpa"]
    return ["fa2", "cudnn", "fa3", "fa4", "sdpa"]


def flash_problem(
    package: str, module: str, dims: dict[int, Sequence[int]], function: str = "flash_attn_func"
) -> Callable[[RowKind], str | None]:
    """Why FlashAttention's `function` cannot take rows. `dims`: as in FLASH_DIMS."""

    def problem(rows: RowKind) -> str | None:
        takes = dims.get(rows.capability // 10)
        if takes is None:
            return "does not run on this device"
        if rows.dtype not in (torch.bfloat16, torch.float16):
            return "takes bf16 and fp16 alone"
        if (rows.dim, rows.value_dim) != NARROWER and (rows.dim not in takes or rows.dim != rows.value_dim):
            return f"does not take {rows.dims}"
        if rows.dim != rows.value_dim and rows.heads != rows.groups and (package, rows.capability // 10) == EQUAL_IF_GROUPED:
            return f"does not take {rows.dims} where query heads share them"
        return import_problem(package, module, function)

    return problem


_functions: dict[tuple[str, str], Callable[..., Any]] = {}
"""Functions of the FlashAttention modules that were found, by both names: looked up here by compiled code, which cannot
import."""


def import_problem(
    package: str, module: str, name: str = "flash_attn_func", options: Sequence[str] = ("deterministic",)
) -> str | None:
    """Why FlashAttention's `name` is not there, or not with these options, as the end of a sentence; None where it is."""
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        missing = f"{module}.".startswith(f"{error.name}.")
        return f"is not installed ({package})" if missing else f"is installed but does not import ({error})"
    except Exception as error:
        return f"is installed but does not import ({error})"
    known = inspect.signature(function).parameters
    lacks = [option for option in options if option not in known]  # FlashAttention 2.8 ships an early flash_attn.cute
    if lacks and "kwargs" not in known:  # custom operators, as FlashAttention 3's are, name no options
        return f"is installed, but too old or too new: its {name} takes no {', '.join(lacks)}"
    if package in LEAST and (problem := too_old(package)):
        return problem
    _functions[module, name] = function
    return None


def found(module: str, name: str) -> Callable[..., Any]:
    """A function that `import_problem` found."""
    return _functions[module, name]


def flash_function(module: str, name: str) -> Callable[..., Tensor]:
    """A function that was found, without the log-sum-exp that some releases return beside the output."""

    def call(*args: object, **options: object) -> Tensor:
        out: Tensor | tuple[Tensor, ...] = found(module, name)(*args, **options)
        return out[0] if isinstance(out, tuple) else out

    return call


def _flash(module: str) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
    function = flash_function(module, "flash_attn_func")

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [B, S, heads, D]
        return function(q, k, v, softmax_scale=softmax_scale, causal=True, deterministic=deterministic()).transpose(0, 1)

    return attend


def _torch_problem(backend: SDPBackend) -> Callable[[RowKind], str | None]:
    def problem(rows: RowKind) -> str | None:
        if rows.device.type != "cuda":
            return "needs a GPU"
        q, k, v = (
            torch.empty(1, heads, 128, dim, dtype=rows.dtype, device=rows.device, requires_grad=True)
            for heads, dim in ((rows.heads, rows.dim), (rows.groups, rows.dim), (rows.groups, rows.value_dim))
        )
        given = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, rows.heads != rows.groups)
        can = torch.backends.cuda
        usable = can.can_use_cudnn_attention if backend == SDPBackend.CUDNN_ATTENTION else can.can_use_flash_attention
        return None if usable(given, False) else f"does not take {rows}"

    return problem


def _torch(backend: SDPBackend | None) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        if backend is None:
            return sdpa(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=grouped).permute(2, 0, 1, 3)
        if backend == SDPBackend.CUDNN_ATTENTION and not torch.is_autocast_enabled(q.device.type):
            # what torch would call, without the context, which costs the host some twenty microseconds
            kept = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            cudnn = torch._scaled_dot_product_cudnn_attention
            return cudnn(q, k, v, None, kept, 0.0, True, False, scale=softmax_scale)[0].permute(2, 0, 1, 3)
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=grouped).permute(2, 0, 1, 3)

    return attend


BACKENDS: dict[str, Backend] = {
    "fa4": Backend(
        "FlashAttention 4",
        flash_problem("flash-attn-4", "flash_attn.cute", FLASH_DIMS["fa4"]),
        _flash("flash_attn.cute"),
    ),
    "fa3": Backend(
        "FlashAttention 3",
        flash_problem("hopper/ of the flash-attention repository", "flash_attn_interface", FLASH_DIMS["fa3"]),
        _flash("flash_attn_interface"),
        lambda rows: rows.dim <= REPEATS_TO["fa3"],
    ),
    "cudnn": Backend(
        "cuDNN's attention in torch",
        _torch_problem(SDPBackend.CUDNN_ATTENTION),
        _torch(SDPBackend.CUDNN_ATTENTION),
        lambda rows: False,
    ),
    "fa2": Backend("FlashAttention 2 in torch", _torch_problem(SDPBackend.FLASH_ATTENTION), _torch(SDPBackend.FLASH_ATTENTION)),
    "sdpa": Backend("torch's scaled_dot_product_attention", lambda rows: None, _torch(None)),
}
"""What `--lighthouse-inner` can name, beside 'auto' and 'te' (Transformer Engine's, in its own layer spec)."""

FAMILIES: dict[str, dict[str, Backend]] = {"": BACKENDS}
"""The backends by what they attend over; `softmax.documents` has those over documents, `softmax.blocks` those over parts."""
