"""What a name in a profile stands for: our ranges, kernels and autograd nodes, and the collectives."""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_lighthouse.variants import VARIANTS

COMMUNICATION, DENSE, REST, BETWEEN = (
    "communication",
    "dense attention",
    "rest of the layer and everything else",
    "between the steps",
)
STEPS = ("pool", "score", "select", "gather", "attend", "scatter")
ROWS = (*STEPS, BETWEEN, COMMUNICATION, DENSE, REST)
"""The rows of the table, in its order."""
DIRECTIONS = ("forward", "recompute", "backward")

RANGES = {"attended_norms": "score", "gla": "score", "mass": "score"}
"""Ranges `lighthouse/…` that are part of a step of another name."""
KERNELS = {
    "attended": "score",
    "mass": "score",
    "earlier": "select",
    "edge": BETWEEN,
    "placed": BETWEEN,
    "taken": BETWEEN,
    "deal": BETWEEN,
}
"""Kernels `lighthouse_…` likewise."""
ATTEND = tuple(f"{name}_" for name, variant in VARIANTS.items() if not variant.selects)
"""How the kernels of those begin that are attentions whole."""
IN_BACKWARD = ("_backward", "_suffix_totals", "_suffix_sums")
"""How those of them end that run in backward alone."""
OF_ANY_LAYER = "lighthouse_merge"
"""A kernel of ours that dense layers run too, under context parallelism."""
NODES = {
    "_ScatterBackward": "scatter",
    "_GatherBackward": "gather",
    "_RowsBackward": "gather",
    "_SumsBackward": "gather",
    "_TravelBackward": "gather",
    "_HaloBackward": BETWEEN,
    "_TransferBackward": BETWEEN,
    "_OwnBackward": "scatter",
    "ScatterBackward": "scatter",
    "GatherBackward": "gather",
    "PackedScatterBackward": "scatter",
    "PackedGatherBackward": "gather",
    "_AloneBackward": "attend",
    "DecayedBackward": "attend",
}
"""Our autograd functions: of the reference, whose backward opens no range, of context_parallel/, and of the kernels. Not those
of attention over shards, which dense layers run too."""
ENGINE = "autograd::engine::evaluate_function: "
"""How autograd names each node that it runs: in both profilers, for with Nsight Systems Megatron turns `emit_nvtx` on."""

_COLLECTIVE = re.compile("nccl|nvshmem|userbuffers|deep_ep|^c10d::|^gloo:|^record_param_comms", re.IGNORECASE)
_ATTENTION = re.compile(f"flash|fmha|sdpa|cudnn::fusion::(compute_dot_do_o|convert_dq)|{OF_ANY_LAYER}", re.IGNORECASE)


class Mark(NamedTuple):
    """A row of the table, and the direction that a name tells; None where it tells none."""

    row: str
    direction: str | None


def range_mark(name: str) -> Mark | None:
    """What a range or an operator on the CPU belongs to; None where it is none of ours."""
    name = name.split(",")[0].removeprefix(ENGINE)  # emit_nvtx adds ", seq = 7, …"
    if name in NODES:
        return Mark(NODES[name], "backward")
    if not name.startswith("lighthouse/"):
        return None
    step, _, backward = name.removeprefix("lighthouse/").partition(" ")
    return Mark(RANGES.get(step, _printable(step)), "backward" if backward == "backward" else "forward")


def kernel_mark(name: str) -> Mark | None:
    """What a GPU kernel of ours belongs to, by its name alone; None where that does not tell."""
    if name.startswith(ATTEND):
        own = "forward" if name.endswith("_forward") else None
        return Mark("attend", "backward" if name.endswith(IN_BACKWARD) else own)
    if not name.startswith("lighthouse_") or name == OF_ANY_LAYER:
        return None
    step, *parts = name.removeprefix("lighthouse_").removeprefix("packed_").split("_")  # over packed documents, likewise
    direction = parts[0] if parts and parts[0] in ("forward", "backward") else None
    return Mark(KERNELS.get(step, _printable(step)), direction)


def _printable(step: str) -> str:
    """A step that this module does not know may have any characters in its name."""
    return "".join(c if c.isprintable() else "�" for c in step)


def engine_direction(name: str) -> str | None:
    """'recompute' for a node of autograd that runs a checkpointed forward again, 'backward' for any other, else None."""
    if not name.startswith(ENGINE):
        return None
    return "recompute" if "Checkpoint" in name else "backward"


def is_collective(name: str) -> bool:
    return _COLLECTIVE.search(name) is not None


def is_attention(name: str) -> bool:
    """Whether a GPU kernel's name is that of an attention: cuDNN's, FlashAttention's, Transformer Engine's."""
    return _ATTENTION.search(name) is not None
