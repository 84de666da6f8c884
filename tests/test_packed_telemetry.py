"""Telemetry of packed documents: the measures of one sequence, and what is left of them where documents differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention, plots, running
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse import telemetry
from megatron_lighthouse.lighthouse.packed import reference as packed_reference
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.rule import Rule
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.telemetry import Choice
from megatron_lighthouse.sequence.layout import Layout
from tests.context_parallel.test_documents import row_of
from tests.packed_oracle import of
from tests.ranks import run_ranks
from tests.steps import tensors

MIXED = (37, 3, 64, 100, 1, 35)
CONFIG = LighthouseConfig(levels=3, pooling=2, budget=2, tile_budget=2, document_tile=32, whole_below=8)


def choice_of(lengths: Sequence[int], inputs: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Choice:
    """What a layer over documents keeps."""
    documents = row_of(lengths)
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    own = documents.rows_of_rank(Layout(size, rank))
    with telemetry.watching([1]), running.layer(1):
        lighthouse_attention(*(x[own] for x in inputs), CONFIG, cu_seqlens=documents, cp_group=group)
        return telemetry.watched()[1]


def test_equal_documents_measure_as_one_sequence_of_as_many_tiles() -> None:
    """The same tiles: but a sequence has one pin, and its gap goes back over their starts."""
    inputs, config = [x.cpu() for x in tensors(of((32,) * 4))], CONFIG.replace(pin_first=False, whole_below=0)
    found = []
    for how in ({"cu_seqlens": row_of((32,) * 4)}, {}):
        given = config if how else config.replace(budget=8)
        with telemetry.watching([1]), running.layer(1):
            lighthouse_attention(*inputs, given, **how)
            found.append(telemetry.measures(telemetry.watched()[1]))
    packed, whole = found
    assert packed.pop("gap/mean") <= whole.pop("gap/mean")
    assert packed == pytest.approx(whole)
    assert 0 < packed["later-tokens/cut-50"] < 1


def by_hand(*tokens: int) -> Choice:
    """Documents of 20, 3 and 14 tokens in windows of 2 and tiles of up to 8 windows, of which these tokens are gathered."""
    packing = Packing.of(row_of((20, 3, 14)), Rule(2, 2, tile_budget=2, tile_windows=8, whole_below=4))
    assert packing.tiles[2].tolist() == [8, 2, 7]
    places = torch.full((1, 1, packing.pyramid_length), -1, dtype=torch.int32)
    places[..., list(tokens)] = 0
    return Choice(Selection(packing, places, 0), torch.empty(0), packing, False, packed_reference)


def test_distances_are_in_the_tokens_own_tile_and_gaps_in_its_document() -> None:
    choice = by_hand(0, 1, 16, 19, 23)
    # from the ends of tiles of 16, 4 and 14 tokens: 15/16, 14/16; 3/4, 0; 13/14
    assert telemetry.distances(choice) == [0, 14 / 16, 15 / 16]
    gaps = [0, 0, *range(1, 15), 0, 1, 2, 0, 1, 2, 3, 0, *range(1, 14)]
    assert telemetry.gap(choice.selection) == pytest.approx(sum(gaps) / 37)
    assert telemetry.coverage(choice.selection) == pytest.approx([5 / 37, 0])
    every = by_hand(*range(37), *range(37, 37 + 17))
    assert telemetry.coverage(every.selection) == pytest.approx([1, 34 / 37])


def test_later_tokens_are_cut_in_every_tile() -> None:
    choice = choice_of(MIXED, [x.cpu() for x in tensors(of(MIXED))])
    sizes, kept = choice.geometry.tiles[2].tolist(), []

    class Steps:
        @staticmethod
        def select(scores: Tensor, packing: Packing, pin_first: bool) -> Selection:
            coarsest = scores[0, 0, 0, -sum(sizes) :]
            kept.append([int((x > 0).sum()) for x in coarsest.split(sizes)])
            assert all((x[: int((x > 0).sum())] > 0).all() for x in coarsest.split(sizes))
            return packed_reference.select(scores, packing, pin_first)

    shares = telemetry.later_tokens(replace(choice, steps=Steps))
    assert kept == [[min(max(1, n * percent // 100), n - 1) for n in sizes] for percent in (25, 50, 75)]
    assert all(0 <= share <= 1 for share in shares)
    assert max(shares) > 0


def measured(group: dist.ProcessGroup | None, inputs: Sequence[Tensor]) -> dict[str, float]:
    choice = choice_of(MIXED, inputs, group)
    return telemetry.measures(telemetry.whole(choice, Exchange.over(group)))


def test_two_ranks_measure_what_one_does() -> None:
    inputs = [x.cpu() for x in tensors(of(MIXED))]
    expected = measured(None, inputs)
    for found in run_ranks(2, measured, inputs):
        assert found == pytest.approx(expected, nan_ok=True)


def test_where_all_documents_are_whole_nothing_is_kept() -> None:
    inputs = tensors(of((5, 3)))
    with telemetry.watching([1]), running.layer(1):
        lighthouse_attention(*inputs, CONFIG, cu_seqlens=row_of((5, 3)).cu_seqlens.to(inputs[0].device))
        assert telemetry.watched() == {}


def test_a_picture_has_a_line_at_every_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice, drawn, lines = choice_of(MIXED, [x.cpu() for x in tensors(of(MIXED))]), [], []
    from matplotlib.axes import Axes

    monkeypatch.setattr(Axes, "imshow", lambda self, x, **how: drawn.append(x))
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **how: lines.append(x))
    plots.selection_map(choice.selection, tmp_path / "map.png", "layer 1")
    assert lines == [36.5, 39.5, 103.5, 203.5, 204.5]
    assert (drawn[0][:, [36, 37, 38, 39, 204, 239]] == 0).all()  # in no window
    assert {*drawn[0][0].tolist()} == {0, 1, 2}
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
