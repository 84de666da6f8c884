"""What a scorer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from megatron_lighthouse.lighthouse.geometry import Pyramid, Shape, Tiled
from megatron_lighthouse.nearest import either, multiples

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.lighthouse.packed.packing import Packing
    from megatron_lighthouse.lighthouse.packed.shares import Shares
    from megatron_lighthouse.lighthouse.packed.steps import PackedSteps
    from megatron_lighthouse.lighthouse.rotary import Rotary
    from megatron_lighthouse.lighthouse.steps import Steps


@dataclass(frozen=True)
class Scorer(ABC):
    """What ranks the entries of the pyramid, and what a layer, a plan and a check must know of it."""

    name: str
    """In `--lighthouse-scorer`."""
    reads_values: bool
    by_length: bool
    """Whether it goes by how long queries and keys are: a norm over them leaves it nothing to go by."""
    grows: str
    """How its time grows with N tokens; F = p^(L-1) are a coarsest window."""
    unit: int = 1
    """Tokens that a chunk must be a multiple of, in addition to what the pyramid asks for."""
    by_scale: bool = False
    """Whether it attends by the scale of the layer's softmax."""
    causal: bool = True
    """Whether an entry's scores depend on no token after its last; else on those up to the end of its tile."""
    shares: bool = False
    """Whether ranks share its work over packed documents (`shared`); else each scores the whole row."""
    same_bits: bool = True
    """Whether its numbers are the same to the last bit on any number of ranks, also on a GPU."""

    @abstractmethod
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pyramid: Pyramid,
        steps: Steps,
        exchange: Exchange | None,
        rotary: Rotary | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The scores of the entries of levels 1..L-1, in the order of the concatenated pyramid. Called without gradients.

        Args:
            query: [n, B, H, D], of this rank's tokens; key, value: [n, B, G, D].
            pyramid: of these tokens; `pyramid.tile` is what is selected from at a time.
            exchange: connects the ranks; None where there is one.
            rotary: by which pooled rows are turned on to their window's last token; tokens come rotated already.
            scale: of the layer's softmax, for those that attend by it; 1/sqrt(D) if None.

        Returns:
            s^Q, then s^K: [2, B, G, coarse length], fp32 (fp64 for fp64). They do not depend on how many ranks there are.
        """

    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        steps: PackedSteps,
        rotary: Rotary | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The same of a row of documents, each with the scores that its windows have alone: one after the other, unless a
        scorer does all at once.

        Args:
            query: [t, 1, H, D]; key, value: [t, 1, G, D].
        """
        import torch

        levels: list[list[Tensor]] = [[] for _ in range(1, packing.levels)]
        starts, shape = accumulate(packing.lengths, initial=0), (packing.levels, packing.pooling, packing.rule.tile_windows)
        for start, windows in zip(starts, packing.windows, strict=False):
            if windows:
                pyramid = Tiled(windows * packing.rule.window, *shape)
                tokens = slice(start, start + pyramid.seq_length)
                scores = self(query[tokens], key[tokens], value[tokens], pyramid, steps.alone, None, rotary, scale)
                for level, part in zip(levels, scores.split(pyramid.level_lengths[1:], -1), strict=True):
                    level.append(part)
        return torch.cat([part for level in levels for part in level], -1)

    def shared(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shares: Shares,
        steps: PackedSteps,
        exchange: Exchange,
        rotary: Rotary | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The same of a row whose tokens lie on several ranks, on all of them: here each scores all tokens, unless a scorer
        shares the work.

        Args:
            query: [tokens of the pieces, 1, H, D], of which this rank has those of its windows; key, value: likewise, G.
        """
        query, key, value = (shares.whole_tokens(x, exchange, "scorer") for x in (query, key, value))
        return self.packed(query, key, value, shares.packing, steps, rotary, scale)

    def packed_problem(self, window: int) -> str | None:
        """Why it cannot rank documents whose coarsest windows have so many tokens; None where it can."""
        if window % self.unit == 0:
            return None
        return (
            f"config.scorer {self.name} takes every {self.unit}th token of a document: in packed documents a coarsest "
            f"window, pooling^(levels-1) = {window} tokens, must be a multiple of {self.unit}: use config.pooling 4, or "
            "config.scorer norm or summary."
        )

    @abstractmethod
    def moved(self, pyramid: Pyramid, shape: Shape) -> float:
        """Bytes that it must read and write in a layer, forward, on all ranks: for the plan."""

    @abstractmethod
    def flops(self, pyramid: Pyramid, shape: Shape) -> float:
        """Operations of what it attends with, likewise: a multiply and an add are two."""

    def sent(self, pyramid: Pyramid, shape: Shape, size: int) -> int:
        """Bytes that each of `size` ranks sends in a layer, forward; `pyramid` is that of the whole sequence."""
        return 0

    def check_installed(self, steps: Steps, device: torch.device) -> None:
        """Refuse where a package is missing that it needs on `device`, beside the steps that run there.

        Raises:
            ValueError: the package, and what works without it.
        """
        return None

    def multiple(self, size: int) -> int:
        """Of what N must be a multiple on so many context-parallel ranks."""
        return self.unit if self.unit == 1 or size == 1 else 2 * size * self.unit

    def takes(self, seq_length: int, size: int) -> bool:
        """Whether it can rank `seq_length` tokens on `size` context-parallel ranks."""
        return self.unit == 1 or (seq_length > 0 and seq_length % self.multiple(size) == 0)

    def problem(self, seq_length: int, size: int, lengths: Sequence[int] = ()) -> str | None:
        """Why it cannot rank `seq_length` tokens on `size` context-parallel ranks; None where it can.

        Args:
            lengths: to offer, where other rules decide too.
        """
        if self.takes(seq_length, size):
            return None
        unit = self.multiple(size)
        of = "" if size == 1 else f" of each of the {2 * size} chunks of {size} context-parallel ranks"
        use = either(lengths or multiples(seq_length, unit))
        return (
            f"query's N {seq_length} must be a multiple of {unit} for config.scorer {self.name}, which takes every "
            f"{self.unit}th token{of}: use query's N {use}."
        )

    def check_length(self, rows: int, exchange: Exchange | None) -> None:
        """Raises ValueError where it cannot rank `rows` tokens on each rank."""
        size = 1 if exchange is None else exchange.size
        if problem := self.problem(rows * size, size):
            raise ValueError(problem)


def row_bytes(rows: int, shape: Shape, heads: int) -> float:
    """Of `rows` rows of `heads` heads."""
    return float(rows * heads * shape.batch * shape.dim * shape.itemsize)
