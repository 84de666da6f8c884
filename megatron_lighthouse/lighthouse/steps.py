"""The steps of Lighthouse as an interface, and which implementation of them runs where."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.geometry import Geometry, Pyramid
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.sequence.layout import Layout

HAS_TRITON = find_spec("triton") is not None


class KeyTravel(Protocol):
    """Gathered keys and values on their way to other ranks, and their gradients on the way back."""

    def set_out(self, key: Tensor, value: Tensor) -> None:
        """Begin to send rows that have just been gathered."""

    def come_home(self, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor]:
        """Wait for the other ranks' parts of the gradients, and add them to this rank's own."""


class HaloTravel(Protocol):
    """A halo that is under way to this rank, or its gradient back."""

    def arrive(self) -> None:
        """Wait for the halo."""

    def send_back(self, grad: Tensor) -> None:
        """Begin to send its gradient back."""


class Steps(Protocol):
    """The steps around the inner attention: `megatron_lighthouse.lighthouse.reference`, or `megatron_lighthouse.kernels`."""

    def score(self, query: Tensor, key: Tensor, geometry: Pyramid) -> Tensor:
        """Window maxima of the L2 norms of the rows of both: [2, B, G, coarse length], fp32 (fp64 for fp64), no gradient.

        Args:
            query: [N, B, H, D], any strides. With grouped queries a token's norm is that of its group's H/G rows taken
                as one vector (ours; H = G is the paper).
            key: [N, B, G, D].

        Returns:
            s^Q, then s^K, of the entries of levels 1..L-1, in the order of the concatenated pyramid.
        """

    def attended_norms(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout | None) -> Tensor:
        """The L2 norms of the rows of causal attention, scale 1/sqrt(D): [B, G, n], fp32 (fp64 for fp64), no gradient.

        The same to the last bit whichever rank computes a row, for any number of ranks.

        Args:
            query: [n, B, H, D], any strides: the rows of the two chunks that `layout` gives a rank, one after the other; all
                rows of the sequence where it is None.
            key, value: [C * n, B, G, D], any strides: the whole sequence in its order.

        Returns:
            For each token the norm of its group's H/G rows of the output, taken as one vector (ours; H = G is the paper).
        """

    def select(self, scores: Tensor, geometry: Geometry, pin_first: bool) -> Selection:
        """Choose entries tile by tile, coarse to fine, and number them in causal order.

        At every level above 0 the m/2 candidates of highest s^Q, then the m/2 of highest s^K among the rest, are
        refined: their p children are the next level's candidates. All candidates are gathered. Ties go to the lower
        index. `pin_first` (ours) lets the first window win at each level.
        """

    def gather(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selection: Selection,
        travel: KeyTravel | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The selected rows of the three pyramids: [S, B, H, D], [S, B, G, D], [S, B, G, D]. Pools while gathering.

        With `travel`, keys and values are gathered first, and set out while the queries are; in backward their gradients come
        home while those of the queries are spread. With `rotary`, rows of queries and keys are turned on to the last token of
        their window before they are pooled: see `lighthouse.rotary`.

        Differentiable: dX_j = sum over levels of dX̃[row(l, j // p^l)] / p^l. Keeps only the map for backward.
        """

    def scatter(
        self, rows: Tensor, selection: Selection, halo: Tensor | None = None, travel: HaloTravel | None = None
    ) -> Tensor:
        """Add each row to the positions of its spill range: [S, B, H, D] -> [N, B, H, D].

        Position j sums, over the levels, the row of entry (j - p^l + 1) // p^l where that was gathered. What an entry spills
        past the end of its chunk is dropped. `halo` is [chunks, L-1, B, H, D]: the rows of the entries of levels 1..L-1 that
        end where a chunk begins, zero where not gathered; with `travel` it may still be under way. Differentiable in `rows`
        and `halo`: dÕ_m = sum of dO over the range of entry m. Keeps only the map for backward.
        """


def triton_takes(x: Tensor) -> bool:
    """Whether what is said of a rank's edges and parts is done by Triton on `x`: on a GPU, but not in fp64."""
    return HAS_TRITON and x.is_cuda and x.dtype != torch.float64


STEPS = ("auto", "kernels", "reference")
MOST_POOLING = 16


def steps_for(name: str, query: Tensor, pooling: int = 2) -> Steps:
    """The implementation of the steps that `name` stands for, on `query`'s device and dtype.

    Args:
        name: 'kernels', 'reference', or 'auto': the kernels on a GPU where they can run, else plain PyTorch, said once.
        pooling: p. Above 16 the kernels run, slowly: said once.

    Raises:
        ValueError: 'kernels' where they cannot run.
    """
    from megatron_lighthouse.lighthouse import reference

    if name == "reference" or (name == "auto" and query.device.type != "cuda"):
        return reference
    missing = _missing(query.device.type, query.dtype, query.shape[-1])
    if missing is None:
        from megatron_lighthouse.kernels import lighthouse as kernels

        if pooling > MOST_POOLING:
            say_once(
                f"lighthouse: the kernels are made for --lighthouse-pooling 2 to {MOST_POOLING}: at {pooling} they run out of "
                "registers, and are slow."
            )
        return kernels
    if name == "kernels":
        raise ValueError(f"--lighthouse-steps kernels cannot run: {missing}. Use auto or reference.")
    say_once(f"lighthouse: the steps run in plain PyTorch, many times slower than the kernels: {missing}.")
    return reference


def _missing(device: str, dtype: torch.dtype, dim: int) -> str | None:
    """Why the kernels cannot run, and what would let them; None where they can."""
    if not HAS_TRITON:
        return "the package triton is not installed (torch's CUDA builds for Linux bring it)"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"they run on GPUs, not on the device {device!r} (but with TRITON_INTERPRET=1 in the environment, slowly)"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"they take bf16, fp16 and fp32, not {dtype}"
    if dim > 256:
        return f"they take head dimensions up to 256, not {dim}"
    return None
