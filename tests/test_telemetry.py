"""Telemetry: what is kept, each measure by hand, later tokens against inputs that end earlier, two ranks against one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention, lighthouse_select, plots, running
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.lighthouse import reference, telemetry
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.steps import Steps
from megatron_lighthouse.lighthouse.telemetry import Choice
from tests.context_parallel.shards import shards_of
from tests.oracle import Entry, Problem, entry_at, last_token, problems
from tests.ranks import run_ranks
from tests.steps import DEVICE, chosen, tensors
from tests.test_select import thorough


def choice_of(config: LighthouseConfig, *inputs: Tensor, group: dist.ProcessGroup | None = None) -> Choice:
    """What a layer keeps for telemetry."""
    query, key, value = inputs
    with telemetry.watching([1]), running.layer(1):
        lighthouse_select(query, key, config, value=value, cp_group=group)
        return telemetry.watched()[1]


def by_hand(geometry: Geometry, *heads: Sequence[int]) -> Choice:
    """A choice whose heads gather these tokens; what else they gather is not looked at."""
    places = torch.full((1, len(heads), geometry.pyramid_length), -1, dtype=torch.int32)
    for head, tokens in enumerate(heads):
        places[0, head, list(tokens)] = 0
    return Choice(Selection(geometry, places, 0), torch.empty(0), geometry, False, reference)


# what is kept


def test_the_latest_choice_of_watched_layers_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry._layers, "records", {})
    query, key, value = tensors(Problem(96, 2, 2, 4, 2))
    config = LighthouseConfig(levels=2, pooling=2, budget=4, tile_budget=2)
    telemetry.watch(3)
    telemetry.watch(5)
    assert telemetry.watched() == {}
    lighthouse_attention(query, key, value, config)  # outside of any layer
    with running.layer(4):
        lighthouse_attention(query, key, value, config)
    assert telemetry.watched() == {}
    with running.layer(3):
        lighthouse_attention(query, key, value, config)
        with pytest.raises(RuntimeError), running.layer(4):
            raise RuntimeError
        lighthouse_attention(key, value, query, config)  # still layer 3, and the later one counts
    telemetry.watch(3)  # watching again forgets nothing
    lighthouse_attention(query, key, value, config)
    assert list(telemetry.watched()) == [3]
    assert torch.equal(telemetry.watched()[3].selection.indices, lighthouse_select(key, value, config))
    assert not torch.equal(lighthouse_select(key, value, config), lighthouse_select(query, key, config))


def test_watching_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry._layers, "records", {})
    inputs, config = tensors(Problem(96, 2, 2, 4, 2)), LighthouseConfig(levels=2, pooling=2, budget=4, tile_budget=2)
    telemetry.watch(3)

    def run(*layers: int) -> list[int]:
        for number in layers:
            with running.layer(number):
                lighthouse_attention(*inputs, config)
        return sorted(telemetry.watched())

    with telemetry.watching([2, 3]):
        assert run(2, 3, 4) == [2, 3]
    assert run() == [3]
    with pytest.raises(RuntimeError), telemetry.watching([2]):
        raise RuntimeError
    assert run(2) == [3]


# the measures


@thorough
@given(problems())
def test_entries_and_tokens_are_counted(problem: Problem) -> None:
    query, key, _ = tensors(problem)
    selection = chosen(query, key, LighthouseConfig(**problem.options))
    by_level = telemetry.entries_by_level(selection)
    gathered = [entry_at(i, problem)[0] for i in selection.indices.flatten().tolist()]
    assert by_level == [gathered.count(level) / problem.batch / problem.groups for level in range(problem.levels)]
    assert sum(by_level) == selection.length
    tokens = [count * problem.pooling**level / problem.seq_length for level, count in enumerate(by_level)]
    assert telemetry.coverage(selection) == pytest.approx(tokens)


def test_tokens_that_some_head_sees() -> None:
    geometry = Geometry(8, 2, 2, 2, 2)
    coverage = telemetry.coverage_of_any_head
    assert coverage(by_hand(geometry, [0, 1, 4, 5], [0, 1, 4, 5]).selection)[0] == 4 / 8
    assert coverage(by_hand(geometry, [0, 1, 4, 5], [0, 1, 2, 3]).selection)[0] == 6 / 8
    two = by_hand(geometry, [0, 1, 4, 5], [0, 1, 2, 3]).selection
    apart = Selection(geometry, two.places.movedim(1, 0), 0)  # of two sequences: nothing to do with each other
    assert coverage(apart)[0] == telemetry.coverage(apart)[0] == 4 / 8


def test_distances_from_the_end_of_the_tile() -> None:
    geometry = Geometry(16, 2, 2, 4, 2)  # two tiles of eight tokens
    # 7, 6, 1, 0 tokens from the end of the first tile and 7, 6, 5, 4 from that of the second
    assert telemetry.distances(by_hand(geometry, [0, 1, 6, 7, 8, 9, 10, 11])) == [0, 5 / 8, 7 / 8]
    assert telemetry.distances(by_hand(geometry, [4, 5, 6, 7, 12, 13, 14, 15])) == [0, 1 / 8, 3 / 8]
    assert telemetry.distances(by_hand(geometry, range(16))) == [0, 3 / 8, 7 / 8]


def test_gap_to_the_nearest_single_token() -> None:
    geometry = Geometry(8, 2, 2, 2, 2)
    assert telemetry.gap(by_hand(geometry, [2, 3]).selection) == (1 + 2 + 0 + 0 + 1 + 2 + 3 + 4) / 8
    assert telemetry.gap(by_hand(geometry, range(8)).selection) == 0
    assert telemetry.gap(by_hand(geometry, [2, 3], range(8)).selection) == 13 / 16


# later tokens


BY_HAND = [
    # of eight windows 5 and 6 are refined; of the first two, 0 and 1; of the first four, 0 and 2; of the first six, 2 and 5
    ([5, 0, 0, 0, 0, 9, 0, 0], [0, 0, 3, 0, 0, 0, 7, 0], [1, 1, 1 / 2]),
    ([9, 0, 0, 0, 0, 5, 0, 0], [0, 7, 0, 0, 0, 0, 3, 0], [0, 0, 0]),
    ([9, 0, 0, 0, 0, 5, 0, 0], [0, 3, 0, 0, 0, 0, 0, 7], [1 / 2, 1 / 2, 1 / 2]),
    ([0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0]),
]


def later_tokens(steps: Steps, scores: Tensor) -> list[float]:
    """Of one tile of eight windows of two tokens, by the scores [2, B, G, 8] of these."""
    geometry = Geometry(16, 2, 2, 2, 2)
    return telemetry.later_tokens(Choice(steps.select(scores, geometry, False), scores, geometry, False, steps))


@pytest.mark.parametrize(("by_query", "by_key", "shares"), BY_HAND)
def test_later_tokens_by_hand(by_query: list[int], by_key: list[int], shares: list[float]) -> None:
    scores = torch.tensor([by_query, by_key], dtype=torch.float32).view(2, 1, 1, -1)
    before = scores.clone()
    assert later_tokens(reference, scores) == shares
    assert torch.equal(scores, before)


def test_cuts_are_rounded_down_to_whole_windows() -> None:
    """Of six windows 1, 3 and 4 lie before 25, 50 and 75 per cent; a whole tile would show what later tokens do not."""
    geometry, scores, kept = Geometry(12, 2, 2, 2, 2), torch.ones(2, 1, 1, 6), []

    def select(cut: Tensor, geometry: Geometry, *rule: bool) -> Selection:
        kept.append(cut[0, 0, 0].tolist())
        return reference.select(cut, geometry, *rule)

    steps: Any = SimpleNamespace(select=select)
    telemetry.later_tokens(Choice(reference.select(scores, geometry, False), scores, geometry, False, steps))
    assert kept == [[1.0] * windows + [0.0] * (6 - windows) for windows in (1, 3, 4)]


def test_later_tokens_by_the_kernels() -> None:
    """All heads at once: each refines two of the entries before a cut, or is refused both."""
    scores = torch.tensor([x[:2] for x in BY_HAND], dtype=torch.float32, device=DEVICE).movedim(1, 0).unsqueeze(2).contiguous()
    shares = [4 + 0 + 2 + 0, 4 + 0 + 2 + 0, 2 + 0 + 2 + 0]  # tokens that change, of four a head
    assert later_tokens(kernels, scores) == [n / 16 for n in shares] == later_tokens(reference, scores)


def gathered(indices: Tensor, problem: Problem, end: int) -> set[tuple[int, int, Entry]]:
    """Batch element, head and entry of all that is gathered of levels 0..L-2 and ends before `end`."""
    found = set()
    for b, heads in enumerate(indices.tolist()):
        for g, entries in enumerate(heads):
            for level, i in (entry_at(place, problem) for place in entries):
                if level < problem.levels - 1 and last_token((level, i), problem) < end:
                    found.add((b, g, (level, i)))
    return found


@pytest.mark.parametrize("scorer", [name for name, scorer in SCORERS.items() if scorer.causal])
@pytest.mark.parametrize("pin_first", [True, False])
def test_later_tokens_against_an_input_that_ends_at_the_cut(scorer: str, pin_first: bool) -> None:
    """In one tile, which a shorter sequence has too."""
    ends = (16, 32, 48)
    whole, *short = (Problem(n, 3, 2, 4, 4, pin_first=pin_first, batch=2, groups=2, queries_per_group=2) for n in (64, *ends))
    query, key, value = (x.cpu() for x in tensors(whole))
    config = LighthouseConfig(**whole.options, scorer=scorer)
    full = lighthouse_select(query, key, config, value=value)
    expected = []
    for n, problem in zip(ends, short, strict=True):
        cut = lighthouse_select(query[:n], key[:n], config, value=value[:n])
        a, b = gathered(full, whole, n), gathered(cut, problem, n)
        expected.append(len(a ^ b) / len(a | b))
    assert telemetry.later_tokens(choice_of(config, query, key, value)) == expected
    assert 0 < expected[0] < 1


@pytest.mark.parametrize("scorer", SCORERS)
def test_whether_scores_are_causal_is_what_a_scorer_says(scorer: str) -> None:
    """Those of windows before the end of a shorter input; of others later tokens of the tile cannot be told apart."""
    problem = Problem(64, 3, 2, 4, 4, groups=2, queries_per_group=2)
    config = LighthouseConfig(**problem.options, scorer=scorer)
    query, key, value = (x.cpu() for x in tensors(problem))
    choice, short = (choice_of(config, *(x[:n] for x in (query, key, value))) for n in (64, 32))
    same = torch.allclose(choice.scores.split([32, 16], -1)[1][..., :8], short.scores.split([16, 8], -1)[1], rtol=1e-9)
    assert same == SCORERS[scorer].causal
    assert math.isnan(telemetry.later_tokens(choice)[0]) == (not same)


def test_later_tokens_of_several_tiles() -> None:
    """Against zeros in place of the tokens after the cut of every tile: to the norms these are no tokens."""
    problem = Problem(3 * 32, 3, 2, 12, 4, groups=2)
    config = LighthouseConfig(**problem.options)
    query, key, value = tensors(problem)
    full, expected = lighthouse_select(query, key, config), []
    for cut in (8, 16, 24):
        kept = (torch.arange(96, device=DEVICE) % 32 < cut).view(-1, 1, 1, 1)
        short = lighthouse_select(query * kept, key * kept, config)
        pairs = []
        for indices in (full, short):
            entries = gathered(indices, problem, 96)
            pairs.append({(b, g, entry) for b, g, entry in entries if last_token(entry, problem) % 32 < cut})
        expected.append(len(pairs[0] ^ pairs[1]) / len(pairs[0] | pairs[1]))
    assert telemetry.later_tokens(choice_of(config, query, key, value)) == expected


# several ranks


def measured(group: dist.ProcessGroup | None, inputs: Sequence[Tensor], config: LighthouseConfig) -> dict[str, float]:
    choice = choice_of(config, *shards_of(group, inputs), group=group)
    return telemetry.measures(telemetry.whole(choice, Exchange.over(group)))


def measured_by_heads(group: dist.ProcessGroup, inputs: Sequence[Tensor], config: LighthouseConfig) -> dict[str, float]:
    """As tensor parallelism shares them out."""
    choice = choice_of(config, *(x.chunk(group.size(), 2)[group.rank()] for x in inputs))
    return telemetry.measures(telemetry.whole(choice, None, Exchange.over(group)))


@pytest.mark.parametrize(
    "problem",
    [Problem(128, 3, 2, 8, 2, batch=2, groups=2), Problem(64, 3, 2, 4, 4, batch=2, groups=2)],
    ids=["tiles within chunks", "one tile"],
)
def test_measures_of_two_ranks(problem: Problem) -> None:
    config = LighthouseConfig(**problem.options)
    inputs = [x.cpu() for x in tensors(problem)]
    one = measured(None, inputs, config)
    assert run_ranks(2, measured, inputs, config) == [one, one]
    assert run_ranks(2, measured_by_heads, inputs, config) == [one, one]
    assert list(one) == telemetry.measure_names(3)
    assert one["coverage/level-2"] == 1
    assert 0 < one["distance/p10"] < one["distance/p90"] < 1


def test_a_picture_of_more_levels_than_colours(tmp_path: Path) -> None:
    config = LighthouseConfig(levels=8, pooling=2, budget=4, tile_budget=4)
    selection = choice_of(config, *(torch.randn(512, 1, 2, 8) for _ in range(3))).selection
    plots.selection_map(selection, tmp_path / "map.png", "eight levels")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert len(set(plots._colours(8))) == 8
