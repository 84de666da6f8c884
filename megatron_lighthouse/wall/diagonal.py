"""The diagonal: the pairs of rows that lie so near each other that no anchor stands between them. One function, two makers.

    s_ij = scale Σ_n q_in k_jn exp(Σ_{j<t<=i} g_tn) + Σ_{j<t<=i} γ_t        o_i = Σ_j softmax_j(s_ij) v_j

Row i sees the keys first[i]..i, itself always among them. So documents, windows and chunks are one thing here. Everything else
of Wall is plain softmax attention on rows that have been decayed to an anchor (`earlier`).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""Of query, key, value, gate and scalar gate."""


class Diagonal(Protocol):
    """What the reference and the kernels implement, each as a module."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scalar_gate: Tensor | None, scale: float, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention of each row to the keys first[i]..i.

        Any strides; n, K and V of any size (n may be 1, or no multiple of a tile); K and V may differ.

        Args:
            query: [n, B, H, K]; float32, bfloat16 or float16 (the reference: float64 too).
            key: [n, B, G, K]; query head h reads key/value head h // (H/G).
            value: [n, B, G, V]. All three have one dtype.
            gate: [n, B, H, K] <= 0, natural logarithms, -inf too; in the dtype of sums: float32, of float64 inputs float64.
            scalar_gate: [n, B, H] <= 0, likewise; None: no γ.
            scale: on q·k alone.
            first: [n] int32 on the inputs' device, 0 <= first[i] <= i, never falling. first[t] == t: no pair crosses from
                before row t to t or later, so that what is summed over gates may begin anew there.

        Returns:
            [n, B, H, V] in the query's dtype; and the log-sum-exp of the logits [B, H, n], natural logarithm, finite, in the
            dtype of sums.
        """

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor,
        scalar_gate: Tensor | None,
        out: Tensor,
        lse: Tensor,
        scale: float,
        first: Tensor,
    ) -> Grads:
        """Gradients by way of the diagonal's pairs alone. With p_ij = exp(s_ij - lse_i) and ds = p (dO·v_j - dO_i·out_i):

            dq_i = scale Σ_j ds_ij k_j E_ij    dk_j = scale Σ_h Σ_i ds_ij q_i E_ij    dv_j = Σ_h Σ_i p_ij dO_i
            dg_t = scale Σ_{j<t<=i} ds_ij q_i k_j E_ij    dγ_t = Σ_{j<t<=i} ds_ij        E_ij = exp(Σ_{j<t<=i} g_t)

        Args:
            grad: [n, B, H, V], of the output of the *whole* rows, in the query's dtype.
            out, lse: as `forward` gives them, but of the whole rows: over keys that are not the diagonal's too, and a sink. So
                Σ_j p_ij over the diagonal is 1 at most, and Σ_j ds_ij is not 0.

        Returns:
            dq, dk and dv in the inputs' dtype and shapes, dk and dv summed over the heads of a group in the dtype of sums; dg
            [n, B, H, K] and dγ [n, B, H] (None without γ) in the gates'. Both are exactly 0 at rows with first[t] == t, and
            nothing is nan or inf wherever gates are -inf. The same bits each time.
        """
