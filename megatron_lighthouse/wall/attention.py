"""Wall attention as a function (Tilde Research, 2026)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.given import bounds_of, check_tokens, check_types
from megatron_lighthouse.softmax.inputs import check
from megatron_lighthouse.wall.layer import build
from megatron_lighthouse.wall.pieces import Sight


def wall_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    scalar_gate: Tensor | None = None,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    cp_group: ProcessGroup | None = None,
    cp_comm_type: str = "p2p",
) -> Tensor:
    """Causal softmax attention whose keys fade, channel by channel, by the gates of the tokens after them.

        s_ij = scale Σ_n q_in k_jn exp(Σ_{j<t<=i} g_tn) + Σ_{j<t<=i} γ_t
        o_i = Σ_j p_ij v_j,   p_ij = exp(s_ij) / (exp(β) + Σ_j exp(s_ij))

    Gates of 0 are softmax attention without positions. A channel that has faded adds 0 to the logit: only γ, the gate of
    FoX (arXiv 2503.02130), takes weight from a key. A document's first gate has no effect, and a gradient of 0.

    Args:
        query: [N, B, H, K], float64, float32, bfloat16 or float16, any strides; rotated only where the two channels of a pair
            have the same gates, with which a rotation commutes.
        key: [N, B, G, K], G dividing H: query head h reads key/value head h // (H/G).
        value: [N, B, G, V]; V may differ from K.
        gate: g, [N, B, H, K], or [N, B, G, K] where the query heads of a group share them; natural logarithms <= 0, of any
            size, -inf too. Any floating dtype: float32 keeps what bfloat16 rounds. Gates above 0 are refused by one rank on a
            CPU. Elsewhere they are not looked for, since that would hold up the host, or one rank would fail alone; what
            they give is not defined.
        scalar_gate: γ, [N, B, H], likewise; none by default.
        sink: β, [H], a logit of which the weight goes to no value; none by default.
        softmax_scale: on q·k alone; 1/sqrt(K) by default.
        cu_seqlens: [documents + 1] int32 or int64, from 0 to the tokens of all ranks: each document is as if it were alone.
            B = 1. Read on the host.
        window: of W tokens: a query sees the W keys up to its own. All by default.
        cp_group: the context-parallel ranks among which the sequence is sharded. Each of C ranks passes its zigzag shard,
            [N/C, B, ·, ·]: of 2C equal chunks, rank r holds chunk r and chunk 2C-1-r. The gradient of `sink` is then each
            rank's share of a sum.
        cp_comm_type: 'p2p', 'all_gather' or 'a2a'.

    Returns:
        [N, B, H, V] in the query's dtype; under context parallelism, this rank's shard.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, gates above 0, or what cannot be done. Raised before any
            collective.
        TypeError: an argument of another type.
        RuntimeError: under torch.func or forward-mode differentiation; in backward, a second derivative.
    """
    check_types(query=query, key=key, value=value, gate=gate, scalar_gate=scalar_gate, sink=sink)
    check_types(softmax_scale=softmax_scale, window=window, cp_group=cp_group)
    exchange = Exchange.over(cp_group)
    check(query, key, value)
    check_gates(query, key, gate, scalar_gate, sink)
    if exchange is None and query.device.type == "cpu":
        _check_signs(gate=gate, scalar_gate=scalar_gate)
    check_tokens(query, window, exchange)
    bounds = () if cu_seqlens is None else bounds_of(cu_seqlens, query, exchange.size if exchange else 1)
    how = (exchange, cp_comm_type, softmax_scale, Sight(bounds, window))
    attend = build(query, key, value, gate.shape[2], *how, biased=scalar_gate is not None)
    return attend(query, key, value, gate, None if scalar_gate is None else scalar_gate.unsqueeze(-1), sink)


def check_gates(query: Tensor, key: Tensor, gate: Tensor, scalar_gate: Tensor | None, sink: Tensor | None) -> None:
    """Raises ValueError where gates or sink do not fit the queries."""
    tokens, batch, heads, dim = query.shape
    of_heads: list[tuple[int, ...]] = [(tokens, batch, some, dim) for some in dict.fromkeys((heads, key.shape[2]))]
    fits: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "gate": (gate, of_heads),
        "scalar_gate": (scalar_gate, [(tokens, batch, heads)]),
        "sink": (sink, [(heads,)]),
    }
    for name, (x, shapes) in fits.items():
        if x is None:
            continue
        if tuple(x.shape) not in shapes:
            raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(x.shape)}.")
        if not x.dtype.is_floating_point or x.device != query.device:
            raise ValueError(f"{name} must be of a floating dtype on {query.device}, got {x.dtype} on {x.device}.")


def _check_signs(**gates: Tensor | None) -> None:
    """Raises ValueError where a gate is above 0 or nan. Reads them on the host."""
    for name, x in gates.items():
        if x is not None and not bool((x <= 0).all()):
            raise ValueError(
                f"{name} must be natural logarithms <= 0, got up to {x.max().item():g}: use such as "
                "torch.nn.functional.logsigmoid."
            )
