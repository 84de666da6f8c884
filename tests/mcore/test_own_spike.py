"""The spike of a run without a switch, in the iterations where another has one."""

from __future__ import annotations

from math import inf

from megatron_lighthouse.recipe.recovery import measure, own_spike

DENSE = {1: 9.0, 2: 3.0, 3: 1.0, 4: 4.0, 5: 2.0, 6: 6.0, 7: 9.0}
RUN = dict.fromkeys(DENSE, 5.0)


def test_the_highest_less_the_mean_before() -> None:
    assert own_spike(RUN, DENSE, 3, 5, 2) == 6.0 - 2.0
    assert own_spike(RUN, DENSE, 3, 5, 1) == 4.0 - 1.0
    assert own_spike(RUN, DENSE, 3, 4, 1) == 4.0 - 1.0
    assert own_spike(DENSE, DENSE, 3, 5, 2) == measure(DENSE, 3, 5, 2).spike


def test_a_dense_warmup_is_no_level() -> None:
    assert own_spike(RUN, DENSE, 3, 4, 9, warmup=1) == 9.0 - 2.0
    assert own_spike(RUN, DENSE, 3, 4, 9, warmup=3) is None


def test_the_iterations_are_the_runs() -> None:
    """A dense run that logs others besides, and one that lacks some."""
    every_other = {i: x for i, x in RUN.items() if i % 2}
    assert own_spike(every_other, {**DENSE, 2: inf, 4: inf, 6: inf}, 3, 5, 1) == 2.0 - 1.0
    assert own_spike(RUN, {i: x for i, x in DENSE.items() if i % 2}, 3, 5, 1) is None
    assert own_spike(RUN, {i: x for i, x in DENSE.items() if i < 6}, 3, 5, 2) is None
    assert own_spike(RUN, {i: x for i, x in DENSE.items() if i != 2}, 3, 5, 2) is None


def test_there_must_be_a_switch() -> None:
    assert own_spike(RUN, DENSE, 7, 8, 2) is None
    assert own_spike({}, DENSE, 3, 5, 2) is None
