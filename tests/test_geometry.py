"""The integers of a layer, against counting by hand and by brute force."""

from __future__ import annotations

import pytest
import torch

from megatron_lighthouse.lighthouse.geometry import Geometry

# N, L, p, k, m
SMALL = Geometry(48, 3, 2, 8, 4)
GEOMETRIES = [SMALL, Geometry(30, 2, 5, 4, 2), Geometry(54, 4, 3, 2, 2), Geometry(64, 5, 2, 4, 4)]


def entries(geometry: Geometry) -> list[tuple[int, int, int]]:
    """(last token, level, number) of all entries, found by cutting the tokens into windows."""
    found = []
    for level in range(geometry.levels):
        window = 1
        for _ in range(level):
            window *= geometry.pooling
        found += [(first + window - 1, level, i) for i, first in enumerate(range(0, geometry.seq_length, window))]
    return found


def test_sizes_counted_by_hand() -> None:
    assert [SMALL.window(level) for level in range(3)] == [1, 2, 4]
    assert [SMALL.entries(level) for level in range(3)] == [48, 24, 12]
    assert [SMALL.offset(level) for level in range(4)] == [0, 48, 72, 84]
    assert SMALL.pyramid_length == 84
    assert SMALL.tiles == 2
    assert SMALL.gathered_length == 12 + 16 + 16  # all coarsest, then p children of k refined entries, twice


def test_the_gathered_length_of_the_paper() -> None:
    # 512K tokens at L=3, p=4, k=4096: the length at which the authors' launch grid overflows
    assert Geometry(2**19, 3, 4, 4096, 128).gathered_length == 65536


def test_spill_counted_by_hand() -> None:
    assert [list(SMALL.spill(level)) for level in range(3)] == [[0], [1, 2], [3, 4, 5, 6]]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sizes_by_brute_force(geometry: Geometry) -> None:
    found = entries(geometry)
    for level in range(geometry.levels):
        assert geometry.entries(level) == sum(other == level for _, other, _ in found)
        assert geometry.offset(level) == sum(other < level for _, other, _ in found)
    assert geometry.pyramid_length == len(found)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_each_position_receives_the_one_entry_of_the_formula(geometry: Geometry) -> None:
    for level in range(geometry.levels):
        window = geometry.window(level)
        received: dict[int, list[int]] = {}
        for i in range(geometry.entries(level)):
            for offset in geometry.spill(level):
                received.setdefault(i * window + offset, []).append(i)
        for position in range(geometry.seq_length):
            expected = (position - window + 1) // window
            assert received.get(position, []) == ([expected] if expected >= 0 else [])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_entries_before_an_entry_by_sorting_all(geometry: Geometry) -> None:
    before = dict.fromkeys(range(geometry.levels), 0)
    for last, level, _ in sorted(entries(geometry)):
        counted = {other: geometry.entries_ending_before(level, last + 1, other) for other in before}
        assert counted == before
        before[level] += 1


def test_entries_before_takes_tensors_of_positions() -> None:
    ends = (torch.arange(SMALL.entries(1)) + 1) * SMALL.window(1)
    for other in range(SMALL.levels):
        one_by_one = [SMALL.entries_ending_before(1, int(end), other) for end in ends]
        assert SMALL.entries_ending_before(1, ends, other).tolist() == one_by_one
