"""The steps of Lighthouse as an interface. What runs them: see `megatron_lighthouse.lighthouse.implementations`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_lighthouse.lighthouse.geometry import Geometry, Pyramid
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.sequence.layout import Layout


class FarTravel(Protocol):
    """Gathered keys and values (the far rows) on their way to other ranks, and their gradients on the way back."""

    def set_out(self, far: tuple[Tensor, ...]) -> None:
        """Begin to send rows that have just been gathered."""

    def come_home(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Wait for the other ranks' parts of the gradients, and add them to this rank's own."""


class HaloTravel(Protocol):
    """A halo that is under way to this rank, or its gradient back."""

    def arrive(self) -> None:
        """Wait for the halo."""

    def send_back(self, grad: Tensor) -> None:
        """Begin to send its gradient back."""


class Steps(Protocol):
    """The steps around the inner attention: `lighthouse.reference`, or `kernels.lighthouse`."""

    def score(self, query: Tensor, key: Tensor, geometry: Pyramid) -> Tensor:
        """Window maxima of the L2 norms of the rows of both: [2, B, G, coarse length], fp32 (fp64 for fp64), no gradient.

        Args:
            query: [N, B, H, D], any strides. With grouped queries a token's norm is that of its group's H/G rows taken
                as one vector (ours; H = G is the paper).
            key: [N, B, G, D].

        Returns:
            s^Q, then s^K, of the entries of levels 1..L-1, in the order of the concatenated pyramid.
        """

    def attended_norms(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, scale: float | None = None
    ) -> Tensor:
        """The L2 norms of the rows of causal attention: [B, G, n], fp32 (fp64 for fp64), no gradient.

        The same to the last bit whichever rank computes a row, for any number of ranks.

        Args:
            query: [n, B, H, D], any strides: the rows of the two chunks that `layout` gives a rank, one after the other; all
                rows of the sequence where it is None.
            key, value: [C * n, B, G, D], any strides: the whole sequence in its order.
            scale: of the softmax; 1/sqrt(D) if None.

        Returns:
            For each token the norm of its group's H/G rows of the output, taken as one vector (ours; H = G is the paper).
        """

    def select(self, scores: Tensor, geometry: Geometry, pin_first: bool, causal: bool = False) -> Selection:
        """Choose entries tile by tile, coarse to fine, and number them in causal order.

        At every level above 0 the m/2 candidates of highest s^Q, then the m/2 of highest s^K among the rest, are
        refined: their p children are the next level's candidates. All candidates are gathered. Ties go to the lower
        index. `pin_first` (ours) lets the first window win at each level. `causal` (ours) chooses without later
        tokens, and lets the first window of each tile win: see `lighthouse.causal`.
        """

    def gather(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selection: Selection,
        travel: FarTravel | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The selected rows of the three pyramids: [S, B, H, D], [S, B, G, D], [S, B, G, D]. Pools while gathering.

        With `travel`, keys and values are gathered first, and set out while the queries are; in backward their gradients come
        home while those of the queries are spread. With `rotary`, rows of queries and keys are turned on to the last token of
        their window before they are pooled: see `lighthouse.rotary`. Values may have no heads: then there are no rows of them.

        Differentiable: dX_j = sum over levels of dX̃[row(l, j // p^l)] / p^l. Keeps only the map for backward.
        """

    def scatter(
        self, rows: Tensor, selection: Selection, halo: Tensor | None = None, travel: HaloTravel | None = None
    ) -> Tensor:
        """Add each row to the positions of its spill range: [S, B, H, D] -> [N, B, H, D].

        Position j sums, over the levels, the row of entry (j - p^l + 1) // p^l where that was gathered and is not silent
        (`Selection.spills`). What an entry spills past the end of its chunk is dropped. `halo` is [chunks, L-1, B, H, D]: the
        rows of the entries of levels 1..L-1 that end where a chunk begins, zero where not gathered; with `travel` it may still
        be under way. Differentiable in `rows` and `halo`: dÕ_m = sum of dO over the range of entry m. Keeps only the map for
        backward.
        """
