"""A causal selection: what it chooses, and that no output rests on a later token, whatever that changes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, Rotary, lighthouse_attention
from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.attention import attended_rows
from megatron_lighthouse.lighthouse.layer import build
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.steps import Steps
from megatron_lighthouse.lighthouse.telemetry import later_tokens
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.wall.config import WallConfig
from megatron_lighthouse.wall.cut import Step
from tests import causal_oracle
from tests.oracle import Problem, number, order, problems
from tests.steps import DEVICE, both, chosen, differentiate, poisoned, precision, random_like, small_problems, tensors
from tests.test_kernels import differentiated
from tests.test_select import level_scores
from tests.test_telemetry import choice_of
from tests.tolerances import assert_close

some = settings(derandomize=True, max_examples=40)
CAUSAL = [name for name, scorer in SCORERS.items() if scorer.causal]
PROBLEM = Problem(96, 3, 2, 12, 4, batch=2, groups=2, queries_per_group=2, dim=8, seed=5)


def config_of(problem: Problem, **more: object) -> LighthouseConfig:
    return LighthouseConfig(**replace(problem, pin_first=True).options, causal_selection=True, **more)  # type: ignore[arg-type]


def places_by_hand(scores: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """The rows of all entries, and of those that are not silent, from level-0 scores [2, B, G, N], by the oracle."""
    length = config_of(problem).geometry(problem.seq_length).pyramid_length
    places, spills = torch.full((2, problem.batch, problem.groups, length), -1, dtype=torch.int32)
    for b in range(problem.batch):
        for g in range(problem.groups):
            entries, silent = causal_oracle.select(*scores[:, b, g].tolist(), problem)
            for row, entry in enumerate(order(entries, problem)):
                places[b, g, number(entry, problem)] = row
                spills[b, g, number(entry, problem)] = -1 if entry in silent else row
    return places, spills


@pytest.mark.parametrize(("steps", "examples"), [(reference, 60), (kernels, 8)], ids=["reference", "kernels"])
def test_places_are_those_of_the_oracle(steps: Steps, examples: int) -> None:
    @settings(derandomize=True, max_examples=examples)
    @given(problem=problems())
    def check(problem: Problem) -> None:
        scores, coarse = level_scores(problem)
        with poisoned():
            selection = steps.select(coarse, config_of(problem).geometry(problem.seq_length), True, True)
        places, spills = places_by_hand(scores, problem)
        assert selection.spills is not None
        assert (selection.places.dtype, selection.spills.dtype) == (torch.int32, torch.int32)
        assert torch.equal(selection.places.cpu(), places)
        assert torch.equal(selection.spills.cpu(), spills)

    check()


def test_more_windows_than_are_ranked_at_a_time() -> None:
    """Of reference and kernels: several blocks, the last not full."""
    problem = Problem(2 * 330, 2, 2, 90, 90)
    _, coarse = level_scores(problem)
    geometry = config_of(problem).geometry(problem.seq_length)
    one, other = (steps.select(coarse, geometry, True, True) for steps in (reference, kernels))
    assert torch.equal(one.places, other.places)
    assert torch.equal(one.places.cpu(), places_by_hand(level_scores(problem)[0], problem)[0])


@both
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_of_either_sign_is_the_highest(sign: int, steps: Steps) -> None:
    """S rows are gathered of whatever a model that has diverged scores by."""
    values = torch.tensor([1, 9, math.copysign(math.nan, sign), 2, math.inf, 0], device=DEVICE)
    geometry = config_of(Problem(12, 2, 2, 2, 2)).geometry(12)
    selection = steps.select(values.expand(2, 1, 1, 6), geometry, True, True)
    refined = (selection.rows[0][0, 0, ::2] >= 0).nonzero().flatten().tolist()
    # the first window by queries, always; of the rest 9 by keys, being first: as no later score is known by then
    assert refined == [0, 1]
    later = values.where(torch.arange(6, device=DEVICE) != 1, 0)
    assert steps.select(later.expand(2, 1, 1, 6), geometry, True, True).length == geometry.gathered_length


@both
def test_the_layer_equals_the_oracle(steps: Steps) -> None:
    inputs = tensors(PROBLEM, precision(steps))
    config = config_of(PROBLEM, steps="reference" if steps is reference else "kernels")
    with poisoned():
        out = lighthouse_attention(*inputs, config)
    indices, expected = causal_oracle.attention(*(x.double().cpu().numpy() for x in inputs), PROBLEM)
    np.testing.assert_array_equal(chosen(*inputs[:2], config).indices.cpu().numpy(), indices)
    assert_close(out, expected, precision(steps))


def test_the_kernels_gradients_are_the_references() -> None:
    inputs, config = tensors(PROBLEM, "float32"), config_of(PROBLEM, steps="kernels")
    with poisoned():
        actual = differentiated(lambda *x: lighthouse_attention(*x, config), inputs)
    wide = config.replace(steps="reference")
    expected = differentiated(lambda *x: lighthouse_attention(*x, wide), [x.double() for x in inputs])
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, "float32")


def test_gradients_against_finite_differences() -> None:
    problem = Problem(24, 3, 2, 4, 2, queries_per_group=2, dim=2)
    inputs, config = [x.requires_grad_() for x in tensors(problem)], config_of(problem)
    selection = chosen(*inputs[:2], config)
    assert selection.spills is not None
    assert (selection.spills < selection.places).any()
    assert torch.autograd.gradcheck(lambda *x: lighthouse_attention(*x, config, selection=selection), inputs)


# no later token


def changed_before(inputs: list[Tensor], config: LighthouseConfig, start: int, rotary: Rotary | None = None) -> int:
    """Positions before `start` whose output changes with the tokens from there on; nothing is held fixed."""
    others = [10 * x for x in random_like(inputs, seed=start)]
    changed = [torch.cat([x[:start], other[start:]]) for x, other in zip(inputs, others, strict=True)]
    before, after = (lighthouse_attention(*x, config, rotary=rotary) for x in (inputs, changed))
    assert not torch.equal(before[start:], after[start:])  # the change was seen
    return int((before[:start] != after[:start]).any(-1).any(-1).any(-1).sum())


@some
@given(problems(), st.data())
def test_later_tokens_change_no_output(problem: Problem, data: st.DataObject) -> None:
    start = data.draw(st.integers(1, problem.seq_length - 1), label="first changed token")
    assert changed_before(tensors(problem), config_of(problem), start) == 0


@pytest.mark.parametrize("rotary", [None, Rotary(torch.tensor([1.0, 0.3]))], ids=["as they come", "turned"])
@pytest.mark.parametrize("scorer", CAUSAL)
def test_later_tokens_change_no_output_by_any_scorer(scorer: str, rotary: Rotary | None) -> None:
    """And of most cuts they change earlier ones where selections are the paper's."""
    config, others = config_of(PROBLEM, scorer=scorer), 0
    for start in range(5, 96, 9):
        inputs = tensors(replace(PROBLEM, seed=start))
        assert changed_before(inputs, config, start, rotary) == 0
        others += changed_before(inputs, config.replace(causal_selection=False), start, rotary) > 0
    assert others > 5


@pytest.mark.parametrize(("scorer", "start"), [("norm", 39), ("summary", 21)])
def test_later_tokens_change_no_output_of_the_kernels(scorer: str, start: int) -> None:
    problem = replace(PROBLEM, seq_length=64, budget=8, batch=1)
    config = config_of(problem, scorer=scorer, steps="kernels")
    assert changed_before(tensors(problem, "float32"), config, start) == 0


@pytest.mark.parametrize(
    ("dtype", "steps"), [("float64", "reference"), ("float32", "reference"), ("bfloat16", "reference"), ("float32", "kernels")]
)
def test_nor_do_they_change_a_gradient(dtype: str, steps: str) -> None:
    """Of a loss of the positions before them; and by them goes none."""
    problem = replace(PROBLEM, seq_length=48, budget=6, tile_budget=2)
    inputs, config = tensors(problem, dtype), config_of(problem, steps=steps)
    grad, others = random_like(inputs[:1])[0], [10 * x for x in random_like(inputs, seed=8)]
    for start in (7, 22, 37):
        before = torch.cat([grad[:start], torch.zeros_like(grad[start:])])
        changed = [torch.cat([x[:start], other[start:]]) for x, other in zip(inputs, others, strict=True)]
        found = [differentiate(lambda *x: lighthouse_attention(*x, config), given, [before]) for given in (inputs, changed)]
        for one, other in zip(*found, strict=True):
            assert torch.equal(one[:start], other[:start])
            assert not one[start:].any()
            assert not other[start:].any()


def test_nor_where_heads_share_a_selection() -> None:
    inputs, config = tensors(PROBLEM), config_of(PROBLEM, heads_per_selection=2)
    assert [changed_before(inputs, config, start) for start in (17, 50, 79)] == [0, 0, 0]


@pytest.mark.parametrize("start", [5, 39, 70])
def test_nor_where_rows_are_gathered_for_another_attention(start: int) -> None:
    """Of keys with a mean, which Parallax takes from them elsewhere: that is of later ones too."""
    *inputs, stream = [*tensors(PROBLEM), random_like(tensors(PROBLEM)[:1])[0]]
    inputs[1] += 3
    config = config_of(PROBLEM, around="parallax")
    others = [10 * x for x in random_like([*inputs, stream], seed=39)]
    changed = [torch.cat([x[:start], other[start:]]) for x, other in zip((*inputs, stream), others, strict=True)]
    before, after = (lighthouse_attention(*x[:3], config, streams=x[3:]) for x in ([*inputs, stream], changed))
    assert torch.equal(before[:start], after[:start])
    assert not torch.equal(before[start:], after[start:])
    selection = attended_rows(*inputs, config, streams=[stream]).selection
    paper = config.replace(causal_selection=False)
    assert_close(before, lighthouse_attention(*inputs, paper, streams=[stream], selection=selection), "float64")


@pytest.mark.parametrize("pieces", [4096, 16])
@pytest.mark.parametrize("options", [WallConfig(), WallConfig(tied_gates=True, scalar_gate=True)], ids=["wall", "all of wall"])
@pytest.mark.parametrize("start", [17, 39, 50])
def test_nor_where_keys_fade(start: int, options: WallConfig, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor their gates. Pieces end among the rows, or beyond them."""
    monkeypatch.setattr(Step, "TOKENS", pieces)
    query, key, _ = inputs = tensors(PROBLEM)
    gates = [(key if options.tied_gates else query).sigmoid().log()]
    gates += [query[..., :1].sigmoid().log()] if options.scalar_gate else []
    others = [*(10 * x for x in random_like(inputs, seed=start)), *(3 * x for x in gates)]
    changed = [torch.cat([x[:start], other[start:]]) for x, other in zip((*inputs, *gates), others, strict=True)]
    config = config_of(PROBLEM, around="wall")
    before, after = (lighthouse_attention(*x[:3], config, streams=x[3:], around=options) for x in ([*inputs, *gates], changed))
    assert torch.equal(before[:start], after[:start])
    assert not torch.equal(before[start:], after[start:])


@some
@given(small_problems)
def test_no_position_is_empty(problem: Problem) -> None:
    query, key, value = tensors(problem)
    for x in (query, key):
        x[: problem.window] *= 1e-3
    out = lighthouse_attention(query, key, value, config_of(problem))
    assert not (out == 0).all(-1).any()


@pytest.mark.parametrize("scorer", CAUSAL)
def test_telemetry_finds_no_later_token(scorer: str) -> None:
    inputs = [x.cpu() for x in tensors(PROBLEM)]
    assert later_tokens(choice_of(config_of(PROBLEM, scorer=scorer), *inputs)) == [0, 0, 0]
    assert min(later_tokens(choice_of(LighthouseConfig(**PROBLEM.options, scorer=scorer), *inputs))) > 0


# what it does not go with


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scorer": "mass"}, "config.scorer mass .*: use config.scorer dilated or gla, where .* also norm or summary, or"),
        ({"pin_first": False}, "causal_selection True .* config.pin_first False .*: use config.pin_first True"),
    ],
)
def test_refused(more: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LighthouseConfig(causal_selection=True, **more)  # type: ignore[arg-type]


def test_a_scorer_that_is_offered_is_causal() -> None:
    query, key, _ = tensors(PROBLEM)
    value = key[..., :4]
    for causal, offered in ((True, "config.scorer norm."), (False, "config.scorer norm or mass.")):
        config = config_of(PROBLEM, scorer="dilated").replace(causal_selection=causal)
        with pytest.raises(ValueError, match=f"reads values .*: use {offered}$"):
            lighthouse_attention(query, key, value, config)


def test_documents_are_refused() -> None:
    inputs = [x[:, :1] for x in tensors(PROBLEM)]
    documents = Documents.of(torch.tensor([0, 40, 96], dtype=torch.int32, device=DEVICE), 96, inputs[0].device)
    with pytest.raises(ValueError, match="causal_selection True is not done for packed documents"):
        lighthouse_attention(*inputs, config_of(PROBLEM), cu_seqlens=documents)


def test_rows_are_as_many() -> None:
    query, key, _ = tensors(PROBLEM)
    lengths = [
        build(config, query, key).geometry.gathered_length
        for config in (config_of(PROBLEM), LighthouseConfig(**PROBLEM.options))
    ]
    assert lengths == [chosen(query, key, config_of(PROBLEM)).length] * 2
