"""Rotary positions of pooled rows: held to raw rows that are pooled first, then rotated at the last token of their window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.steps import Steps
from tests.oracle import Array, Entry, Problem, last_token, pool
from tests.steps import (
    DEVICE,
    both,
    differentiate,
    entries,
    inner_product,
    poisoned,
    precision,
    random_like,
    restride,
    selection_of,
    tensors,
)
from tests.tolerances import assert_close

# L, p, D, pairs, interleaved, first: all channels, a part, a part behind others (MLA), odd and padded sizes
SHAPES = {
    "halves": (3, 4, 16, 8, False, 0),
    "neighbours": (3, 4, 16, 8, True, 0),
    "partial": (4, 2, 32, 4, False, 0),
    "partial neighbours": (2, 5, 16, 4, True, 0),
    "last channels": (3, 3, 24, 4, False, 16),
    "last neighbours": (3, 2, 24, 4, True, 16),
    "middle, odd": (3, 3, 19, 3, False, 5),
    "padded": (3, 2, 40, 20, False, 0),
    "padded neighbours": (3, 2, 40, 20, True, 0),
    "one pair": (2, 2, 3, 1, False, 0),
}
START = 1000
"""Where the sequence's positions begin: rows do not know."""

shapes = pytest.mark.parametrize("name", list(SHAPES))


def problem_of(name: str) -> tuple[Problem, Rotary]:
    levels, pooling, dim, pairs, interleaved, first = SHAPES[name]
    problem = Problem(
        6 * pooling ** (levels - 1), levels, pooling, 4, 2, batch=2, groups=1, queries_per_group=2, dim=dim, seed=len(name)
    )
    inv_freq = torch.from_numpy(np.random.default_rng(7).uniform(0.01, 2.0, pairs))
    return problem, Rotary(inv_freq, interleaved, first)


def rotated(x: Array, positions: Array, rotary: Rotary) -> Array:
    """x [n, ..., D] rotated by its positions [n], pairs as complex numbers."""
    first, second = (
        ((np.arange(rotary.pairs) * step + rotary.first + off) for step, off in ((2, 0), (2, 1)))
        if rotary.interleaved
        else (np.arange(rotary.pairs) + rotary.first + off for off in (0, rotary.pairs))
    )
    turns = np.exp(1j * np.outer(positions, rotary.inv_freq.numpy()))
    turns = turns.reshape(len(x), *[1] * (x.ndim - 2), rotary.pairs)
    pairs = (x[..., first] + 1j * x[..., second]) * turns
    out = x.copy()
    out[..., first], out[..., second] = pairs.real, pairs.imag
    return out


def raw_and_given(problem: Problem, rotary: Rotary, dtype: str) -> tuple[list[Array], list[Tensor]]:
    """q, k, v as they are projected, and as core attention gets them."""
    raw = list(problem.arrays())
    positions = START + np.arange(problem.seq_length)
    given = [rotated(raw[0], positions, rotary), rotated(raw[1], positions, rotary), raw[2]]
    return raw, restride("batch and heads first", *(torch.from_numpy(x).to(DEVICE, getattr(torch, dtype)) for x in given))


def expected_rows(x: Array, chosen: list[Entry], problem: Problem, rotary: Rotary | None) -> Array:
    """The rows [S, D] of one head: pooled raw, then rotated at the last token of each window."""
    rows = pool(x, chosen, problem)
    ends = np.array([START + last_token(entry, problem) for entry in chosen])
    return rows if rotary is None else rotated(rows, ends, rotary)


@both
@shapes
def test_rows_are_pooled_raw_and_rotated_at_the_last_token(steps: Steps, name: str) -> None:
    problem, rotary = problem_of(name)
    chosen = entries(problem)
    raw, given = raw_and_given(problem, rotary, precision(steps))
    with poisoned():
        rows = steps.gather(*given, selection_of(problem, chosen), rotary=rotary)
    for x, gathered, how in zip(raw, rows, (rotary, rotary, None), strict=True):
        ratio = x.shape[2] // problem.groups
        for b in range(problem.batch):
            for head in range(x.shape[2]):
                expected = expected_rows(x[:, b, head], chosen[b][head // ratio], problem, how)
                assert_close(gathered[:, b, head], expected, precision(steps))


@both
@shapes
def test_backward_is_the_adjoint(steps: Steps, name: str) -> None:
    problem, rotary = problem_of(name)
    selection = selection_of(problem, entries(problem))
    inputs = tensors(problem, precision(steps))
    with poisoned():
        rows = steps.gather(*inputs, selection, rotary=rotary)
        grads = random_like(rows)
        back = differentiate(lambda *x: steps.gather(*x, selection, rotary=rotary), inputs, grads)
    for i in range(3):
        assert_close(inner_product([back[i]], [inputs[i]]), inner_product([rows[i]], [grads[i]]), f"adjoint {precision(steps)}")


@both
@shapes
def test_gradients_are_turned_back(steps: Steps, name: str) -> None:
    """One row's gradient reaches its window's tokens rotated from the last token back to theirs, over the window's size."""
    problem, rotary = problem_of(name)
    chosen = entries(problem)
    selection, inputs = selection_of(problem, chosen), tensors(problem, precision(steps))
    place = next(i for i, (level, _) in enumerate(chosen[1][0]) if level == problem.levels - 1)
    level, window = chosen[1][0][place]
    rows = steps.gather(*inputs, selection, rotary=rotary)
    grads = [torch.zeros_like(x) for x in rows]
    grads[1][place, 1, 0] = random_like([grads[1][place, 1, 0]])[0]
    with poisoned():
        back = differentiate(lambda *x: steps.gather(*x, selection, rotary=rotary), inputs, grads)
    width = problem.pooling**level
    offsets = np.arange(width) - (width - 1)
    sent = np.repeat(grads[1][place, 1, 0].double().cpu().numpy()[None], width, 0)
    expected = np.zeros(back[1].shape)
    expected[window * width : (window + 1) * width, 1, 0] = rotated(sent, offsets, rotary) / width
    assert_close(back[1], expected, precision(steps))
    assert not back[0].any()
    assert not back[2].any()


def test_a_table_is_made_once() -> None:
    rotary = Rotary(torch.tensor([1.0, 0.5]))
    assert rotary.turns(16, torch.device("cpu")) is rotary.turns(16, torch.device("cpu"))
    assert rotary.turns(4, torch.device("cpu")).shape == (4, 2, 2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"inv_freq": torch.ones(2, 2)}, "a vector of finite numbers"),
        ({"inv_freq": torch.ones(0)}, "a vector of finite numbers"),
        ({"inv_freq": torch.tensor([1.0, float("inf")])}, "a vector of finite numbers"),
        ({"inv_freq": torch.ones(2), "first": -2}, "first -2"),
        ({"inv_freq": torch.ones(2), "first": 3, "interleaved": True}, "even and not negative"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Rotary(**given)  # type: ignore[arg-type]


def test_a_head_that_is_too_small_is_named() -> None:
    rotary = Rotary(torch.ones(4), first=2)
    assert rotary.problem(10) is None
    assert "head dimension of 9" in str(rotary.problem(9))
