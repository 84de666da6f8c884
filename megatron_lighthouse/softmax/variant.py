"""Dense attention, as Megatron has it."""

from __future__ import annotations

from megatron_lighthouse.variant import Variant


class Dense(Variant):
    """Megatron's own core attention, of the layer spec that it would take anyway."""

    name, title = "dense", "dense attention"
    help = "is Megatron's own"
    native = counted = True


DENSE = Dense()
