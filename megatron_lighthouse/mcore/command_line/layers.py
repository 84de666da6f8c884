"""Which layers of a model hold attention, and so may take Lighthouse. Imports no Megatron.

Multi-token-prediction layers are not among a model's numbered layers, and stay dense.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any


def attention_layers(model: Any) -> tuple[int, ...] | None:
    """The numbers, from 1, of the layers that hold attention; None where all do.

    In a heterogeneous model (`--heterogeneous-layers-config-path`) a layer may have none, or a linear map in its place.

    Args:
        model: a TransformerConfig, or Megatron's arguments.

    Raises:
        ValueError: a description of the layers that is no such JSON.
    """
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


def in_words(numbers: Sequence[int]) -> str:
    """Such as "3 to 5, 8"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
