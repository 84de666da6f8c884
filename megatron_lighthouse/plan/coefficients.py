"""What measurements say about speed, as `calibration` fits it and `time` uses it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_lighthouse.plan.device import H200

type Fit = tuple[float, ...]


@dataclass(frozen=True)
class Coefficients:
    """Seconds that do not depend on the device, and times over what the datasheet of the device allows."""

    attention: dict[tuple[str, str], Fit]
    """('dense' or 'inner', 'fwd' or 'fwd+bwd') -> seconds a call, times over flops at the datasheet's rate."""
    steps: dict[tuple[str, str], Fit]
    """(step, direction) -> seconds a call, times over bytes at the datasheet's rate."""
    select: Fit
    """Seconds for each of `work.select_features`."""
    ranks: dict[tuple[str, str], Fit]
    """(scheme, direction) -> seconds for each other rank, seconds a call, times over bytes sent at the link's rate."""
    host: dict[str, float]
    """Scheme, or none -> seconds that the H100's host takes for the attention of a layer, forward and backward."""
    scorer: float
    """Times over the operations of what a scorer attends with, at the datasheet's rate."""
    linear: float
    """Times over flops at the datasheet's rate."""
    copy: float
    """Times over bytes at the datasheet's rate, of a large copy."""
    link: float
    """Times over bytes at the link's datasheet rate."""
    elementwise: float = 1.0
    """Times over the elementwise bytes at the speed of a copy; holds all that a training step has beside what is named."""
    layer_host: float = 0.0
    """Seconds that it takes for the rest of a layer, forward and backward; holds all that it does in a step."""
    h200_host: dict[tuple[str, str], float] = field(default_factory=dict)
    """(attention, scheme or none) -> seconds that an H200's host takes for a whole layer, forward and backward."""
    authors: dict[str, Fit] = field(default_factory=dict)
    """Direction -> seconds a call, times over bytes, of the steps in the authors' code; for the published figures alone."""

    def layer_host_seconds(self, host: str, attention: str, scheme: str) -> float:
        """What a layer takes of that host, forward and backward.

        On the H100's all attentions took alike. Schemes that no H200 ran cost its host as much more than dense `p2p` as there.

        Args:
            host: a device's.
            attention: `dense` or `lighthouse`.
            scheme: of context parallelism; '' on one rank.
        """
        if host != H200:
            return self.layer_host + self.host[scheme]
        if (attention, scheme) in self.h200_host:
            return self.h200_host[attention, scheme]
        return self.h200_host["dense", "p2p"] + self.host[scheme] - self.host["p2p"]

    def without_host(self) -> Coefficients:
        """With a host that is never waited for: the GPU's time alone."""
        none = dict.fromkeys(self.h200_host, 0.0)
        return replace(self, layer_host=0.0, host=dict.fromkeys(self.host, 0.0), h200_host=none)
