"""Both stages of a run on one layout: Lighthouse for most of the tokens, then dense. What either needs, counts (ours)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lighthouse.plan import memory, time
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.run import Run

FRACTION = 0.6
"""Share of the tokens that stage 1 takes where nothing is said: what the experiments trained (docs/quality.md)."""


@dataclass(frozen=True)
class Stages:
    """A run of stage 1, which `run` is, and the dense stage after it. Of a dense run there is one."""

    run: Run
    fraction: float = FRACTION
    """Share of the tokens in stage 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"--stage1-fraction {self.fraction:g} must be from 0 to 1: use 0.6, or 1 to leave stage 2 out.")

    @property
    def dense(self) -> Run:
        """What it becomes: dense, or what it was around."""
        return self.run.change(attention=self.run.base.name)

    @property
    def shares(self) -> list[tuple[float, Run]]:
        """The stages that have tokens, with their share of them."""
        if not self.run.variant.selects:
            return [(1.0, self.run)]
        return [(share, run) for share, run in ((self.fraction, self.run), (1 - self.fraction, self.dense)) if share]

    @property
    def runs(self) -> list[Run]:
        return [run for _, run in self.shares]

    def check(self) -> Stages:
        """These stages. Raises ValueError as `Run.check`, of either."""
        for run in self.runs:
            run.check()
        return self

    def seconds(self, tokens: float, speed: Coefficients) -> list[float]:
        """What each stage takes."""
        return [share * tokens / run.gpus / time.tokens_per_gpu(run, speed) for share, run in self.shares]

    def tokens_per_gpu(self, speed: Coefficients) -> float:
        """Tokens a second and GPU, over all of them."""
        return 1 / self.run.gpus / sum(self.seconds(1.0, speed))

    @property
    def fullest(self) -> Run:
        """The stage that needs more memory."""
        return max(self.runs, key=memory.total)
