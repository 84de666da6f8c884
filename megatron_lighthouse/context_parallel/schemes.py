"""Attention over shards: causal attention of a sequence whose rows lie on several ranks, in zigzag order.

Three schemes, as Megatron's `--cp-comm-type` names them. Each rank gives its rows [2s, B, H, D] and gets their output; rows may
be tokens (a dense layer) or gathered rows (Lighthouse), for both come in 2C equal chunks. In all three a rank's work is

    its own rows, causal | all its rows to the early chunks of lower ranks | its late rows to all rows of higher ranks

which is the causal triangle, cut so that all ranks have as much to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_lighthouse.nearest import around, either

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.context_parallel.parts import Block, Scheme

COMM_TYPES = ("p2p", "all_gather", "a2a")
SWITCH = "LIGHTHOUSE_COPY_ENGINE"
"""Environment variable: 0 leaves all that `p2p` sends to the process group."""


def scheme(
    comm_type: str, exchange: Exchange, block: Callable[[], Block], whole: Callable[[], Callable[..., Tensor]]
) -> Scheme:
    """The scheme of that name.

    Args:
        comm_type: 'p2p' passes far rows from rank to rank while attending, 'all_gather' collects them first, 'a2a' exchanges
            rows for heads.
        block: what gives the attention over parts, for the first two.
        whole: what gives the attention over whole sequences of some heads, for the last: of near rows, far rows, and these
            heads' sinks where there are.
    """
    from megatron_lighthouse.context_parallel.gathered import Gathered
    from megatron_lighthouse.context_parallel.heads import ByHeads
    from megatron_lighthouse.context_parallel.ring import Ring

    if comm_type == "a2a":
        return ByHeads(whole(), exchange)
    return Ring(block(), exchange) if comm_type == "p2p" else Gathered(block(), exchange)


def comm_type_problem(comm_type: str, heads: int, groups: int, size: int) -> str | None:
    """Why `size` ranks cannot attend by this scheme; None where they can. Heads and groups are those of one rank."""
    if comm_type not in COMM_TYPES:
        what = "is Transformer Engine's" if comm_type == "a2a+p2p" else "is not known"
        return (
            f"cp_comm_type {comm_type} {what}: use {', '.join(COMM_TYPES[:2])} or {COMM_TYPES[2]}, or "
            "Transformer Engine's layers."
        )
    if comm_type == "a2a" and (heads % size or groups % size):
        fits = around(size, lambda n: heads % n == 0 and groups % n == 0, groups)
        other = f", or cp_group.size() {either(fits)}" if fits else ""
        return (
            f"cp_comm_type a2a shares out the {heads} query and {groups} key/value heads of a tensor-parallel rank among "
            f"cp_group.size() {size}, which must divide both: use cp_comm_type p2p{other}."
        )
    return None


def check_scheme(comm_type: str, query: Tensor, key: Tensor, size: int) -> None:
    """Raises ValueError where `size` ranks cannot attend to such rows, [·, ·, heads, ·], by this scheme."""
    if problem := comm_type_problem(comm_type, query.shape[2], key.shape[2], size):
        raise ValueError(problem)
