"""What one training run is. Ours."""

from __future__ import annotations

from dataclasses import dataclass, replace

REFERENCE = "dense"
"""The run that others are held to."""
GRADUAL = 20
"""The gradual return takes one iteration in so many."""


@dataclass(frozen=True)
class Run:
    """One training run. What is not said is as in the others of its experiment."""

    title: str
    share: int = 0
    """Per cent of the iterations after which it is dense; up to there it uses Lighthouse."""
    warmup: int = 0
    """Per cent of the iterations that are dense before."""
    attention: str = "dense"
    """That of a run without Lighthouse, and of its evaluation."""
    scorer: str = "norm"
    levels: int = 2
    """L."""
    pooling: int = 4
    """p."""
    budget: int = 32
    """k is the sequence length over this."""
    tile_budget: int | None = None
    """m, where it is not the experiment's."""
    dense: int = 2
    """Layers that stay dense at either end."""
    edges: int = 0
    """Times k that these layers have as a budget in place of dense attention."""
    options: str = ""
    model: str = ""
    """Megatron's arguments, where the model is not the experiment's."""
    gradual: bool = False
    """Whether layers return to dense attention one by one."""
    seed: int = 1
    """Of the initial weights and of the order of the data."""
    ranks: int = 1
    """GPUs, by context parallelism."""
    telemetry: bool = False
    """Whether it logs what selection does, ten times in all. Not for a run whose time counts."""
    hindsight: bool = False
    """Whether the checkpoint at the switch is asked how much its selections know of later tokens."""
    until: int | None = None
    """The iteration after which it ends, not trained out and not evaluated: a run that is compared step by step."""
    against: tuple[str, ...] = (REFERENCE,)
    """The runs that it is compared with."""

    def switch(self, steps: int) -> int:
        """The last iteration in which all Lighthouse layers select; 0 for a run that is dense throughout."""
        return steps * self.share // 100

    def warmup_to(self, steps: int) -> int:
        """The last iteration of the dense warm-up; 0 for a run without one."""
        return steps * self.warmup // 100

    def dense_from(self, steps: int) -> int:
        """The first iteration in which all layers are dense; 1 for a run that is dense throughout."""
        return self.switch(steps) + (max(2, steps // GRADUAL) if self.gradual else 1)


def with_second_seed(run: Run) -> Run:
    """The same, held to the second seeds of what it is compared with; the reference, compared with none, to its first."""
    against = tuple(f"{name}-2" for name in run.against) or (REFERENCE,)
    return replace(run, title=f"{run.title}, second seed", seed=2, against=against)
