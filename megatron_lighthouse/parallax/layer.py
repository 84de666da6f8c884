"""A layer of Parallax: what is decided of inputs' shapes, and the call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lighthouse.context_parallel.alone import Alone
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.parts import Scheme
from megatron_lighthouse.context_parallel.schemes import check_scheme, scheme
from megatron_lighthouse.lighthouse.transforms import refuse_transforms
from megatron_lighthouse.parallax.centre import centred
from megatron_lighthouse.parallax.implementations import block_for
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.softmax.base import scale_of


@dataclass(frozen=True, eq=False)  # as softmax.variant.Rows
class Layer:
    """Parallax over the tokens of all ranks."""

    scheme: Scheme
    exchange: Exchange | None = None
    cu_seqlens: Tensor | None = None
    past_alone: bool = False
    """Whether keys stay as they come: their mean is of later ones too, by which outputs are rounded."""

    @profiled("attend")
    def __call__(self, query: Tensor, r: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `parallax_attention`."""
        refuse_transforms(query, r, key, value, of="parallax_attention")
        return self.over_rows(query, r, key, value)

    def over_rows(self, query: Tensor, r: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same, as a step of another attention, which has a name of its own in profiles."""
        keys = key if self.past_alone else centred(key, self.exchange, self.cu_seqlens)
        return self.scheme((query, r), (keys, value))


def build(
    query: Tensor,
    key: Tensor,
    exchange: Exchange | None = None,
    comm_type: str = "p2p",
    softmax_scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    kernels: str = "auto",
    past_alone: bool = False,
) -> Layer:
    """The layer for inputs like these, of which shapes, dtype and device count; see `parallax_attention`.

    Raises:
        ValueError: a scheme that is not known, heads that 'a2a' cannot share out, or kernels that are forced and cannot run.
    """
    check_scheme(comm_type, query, key, exchange.size if exchange else 1)
    scale = scale_of(query, softmax_scale)
    block = block_for(kernels, query, scale, window, cu_seqlens, over_parts=exchange is not None and comm_type != "a2a")
    if exchange is None:
        return Layer(Alone(block), None, cu_seqlens, past_alone)
    return Layer(scheme(comm_type, exchange, lambda: block, lambda: Alone(block)), exchange, None, past_alone)
