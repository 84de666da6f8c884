"""Which layers of a model attend to all tokens, so that they may take Lighthouse, and why none is left. Imports no Megatron.

Multi-token-prediction layers are not among a model's numbered layers, and stay dense.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.options import as_words

LATENT = "+D"
"""The symbols of layers with multi-latent attention, in a hybrid model's pattern."""
ATTEND = "*+"
"""The symbols of layers with attention, and with multi-latent attention, in a hybrid model's pattern."""


def hybrid_pattern(model: Any) -> str | None:
    """The symbols of a hybrid model's layers (`--hybrid-layer-pattern`), one a layer; None of another model.

    Args:
        model: a TransformerConfig, or Megatron's arguments, validated or not.
    """
    pattern = written_pattern(model)[1]
    return pattern.partition("/")[0].replace("|", "") if pattern else None


def is_latent(model: Any) -> bool:
    """Whether its attention is multi-latent: by its flag, or by a pattern's symbols, of which Megatron makes the flag."""
    return bool(getattr(model, "multi_latent_attention", False) or {*(hybrid_pattern(model) or "")} & {*LATENT})


def written_pattern(model: Any) -> tuple[str, str | None]:
    """The flag that names a hybrid model's layers, and what it says; Megatron copies the older one's words to the newer."""
    new, old = (getattr(model, name, None) for name in ("hybrid_layer_pattern", "hybrid_override_pattern"))
    return ("--hybrid-override-pattern" if old and new in (None, old) else "--hybrid-layer-pattern"), new or old


def attention_layers(model: Any, windows: bool = False) -> tuple[int, ...] | None:
    """The numbers, from 1, of the layers that attend to all tokens, or with `windows` to any; None where all do.

    In a heterogeneous model (`--heterogeneous-layers-config-path`) a layer may have no attention, or a linear map in its place,
    and in a hybrid model what its pattern says. With `--window-size` a layer may see a window alone (`is_windowed`).

    Args:
        model: a TransformerConfig, or Megatron's arguments.

    Raises:
        ValueError: a description of the layers that is no such JSON, or a list of windowed layers of another length.
    """
    holding, layers, listed = _holding(model), getattr(model, "num_layers", None), getattr(model, "window_attn_skip_freq", None)
    if not getattr(model, "window_size", None) or not layers:
        return holding
    if isinstance(listed, list) and len(listed) != layers:
        raise ValueError(
            f"--window-attn-skip-freq {listed} is of {len(listed)} layers, and --num-layers is {layers}: give one number a "
            "layer, 1 where it sees a window alone, or one number N, by which each N-th sees all tokens."
        )
    if windows:
        return holding
    numbers = range(1, layers + 1) if holding is None else holding
    return tuple(number for number in numbers if not is_windowed(model, number))


def is_windowed(model: Any, number: int) -> bool:
    """Whether the layer of this number sees a window alone, as Megatron has it."""
    every = getattr(model, "window_attn_skip_freq", None)
    if not getattr(model, "window_size", None) or every is None:
        return bool(getattr(model, "window_size", None))
    return number % every != 0 if isinstance(every, int) else bool(every[number - 1])


def _holding(model: Any) -> tuple[int, ...] | None:
    """The numbers of the layers that hold attention; None where all do."""
    if pattern := hybrid_pattern(model):
        return tuple(number for number, symbol in enumerate(pattern, 1) if symbol in ATTEND)
    name, written = (getattr(model, f"heterogeneous_layers_config_{what}", None) for what in ("path", "encoded_json"))
    experts = getattr(model, "num_moe_experts", None) or getattr(model, "num_experts", None)
    # with experts, or with the text alone on the command line, Megatron 0.19 builds each layer with attention
    if experts or not (name or getattr(model, "heterogeneous_block_specs", False)):
        return None
    try:
        kinds = [block["attention"] for block in json.loads(written or Path(name or "").read_text())["block_configs"]]
        return tuple(n for n, kind in enumerate(kinds, 1) if not kind.get("no_op") and not kind.get("replace_with_linear"))
    except OSError:  # seen by the job alone; where it is not there, Megatron says so
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--heterogeneous-layers-config-path {name} does not describe layers ({type(error).__name__}: {error}): give JSON "
            'with "block_configs", each with an "attention".'
        ) from error


def layer_problems(
    dense_first: int, dense_last: int, layers: int, edge_budget: int | None = None, further: int = 0
) -> Iterator[str]:
    """Of which of the model's layers are dense, or have a budget of their own, of as many as attend to all tokens.

    Args:
        further: tokens of --mtp-num-layers, which have a rule of their own for the first layers: then no numbers are offered.
    """
    for name, count in (("dense_first", dense_first), ("dense_last", dense_last)):
        if count < 0:
            yield f"{flag(name)} {count} must not be negative: use 0 to leave no layer dense."
    if edge_budget is not None and not dense_first + dense_last:
        yield (
            f"{flag('edge_budget')} {edge_budget} is of the first and last layers, and {flag('dense_first')} 0 and "
            f"{flag('dense_last')} 0 name none: leave it out, or name some, such as 2 and 2."
        )
    if dense_first + dense_last >= layers:
        fewer = "" if further else _fewer(dense_first, dense_last, layers)
        yield (
            f"{flag('dense_first')} {dense_first} and {flag('dense_last')} {dense_last} leave none of {layers} layers to "
            f"Lighthouse, of those that attend to all tokens: use {fewer}--attention dense."
        )


def _fewer(dense_first: int, dense_last: int, layers: int) -> str:
    """As many dense layers at both ends as leave one of those that attend to all tokens; nothing where there is none."""
    if layers < 1:
        return ""
    last = min(max(0, dense_last), (layers - 1) // 2)
    first = min(max(0, dense_first), layers - 1 - last)
    return f"{flag('dense_first')} {first} and {flag('dense_last')} {last}, or "


def local_window_problem(size: tuple[int, int] | None) -> str | None:
    """Why a window is none of a causal model's without Transformer Engine, which takes (n, m) for (n, 0).

    Megatron's local attention lets tokens see the m after them, and of a negative n hides all before them.
    """
    if size is None or (size[0] >= 0 and size[1] == 0):
        return None
    fits = f"{size[0]},0" if size[0] >= 0 else "127,0, or so"
    return (
        f"{as_words('--window-size', size)} with --transformer-impl local is none of a causal model: use {fits}, tokens before "
        "a token and none after it, or leave it out."
    )


def window_problem(model: Any) -> str:
    """Of a model whose layers see a window alone, all that attend."""
    every = getattr(model, "window_attn_skip_freq", None)
    given = as_words("--window-size", model.window_size) + ("" if every is None else f" with --window-attn-skip-freq {every}")
    return (
        f"{given} makes all layers see a window alone, and Lighthouse has no meaning in one: give --window-attn-skip-freq N or "
        "a list, by which some that attend see all tokens and take Lighthouse, leave it out, or use --attention dense."
    )


def in_words(numbers: Sequence[int]) -> str:
    """Such as "3 to 5, 8"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
