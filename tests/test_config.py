"""The rules of LighthouseConfig: what is accepted, what is refused, and that the advice in each message works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.lighthouse import remedies as module
from megatron_lighthouse.lighthouse.by_length import TRIED
from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.options import in_flags

Values = dict[str, int]


def message(options: dict[str, object], seq_length: int | None = None) -> str:
    """What the refusal of these options says."""
    try:
        config = LighthouseConfig(**options)
        if seq_length is not None:
            config.geometry(seq_length)
    except ValueError as error:
        return in_flags(str(error))
    pytest.fail(f"not refused: {options}, {seq_length}")


def advice(text: str) -> list[Values]:
    """The settings that a message offers, as field values.

    "…: use --a 1 or 2, or --b 3 --c 4" is [{a: 1}, {a: 2}, {b: 3, c: 4}]. Numbers without a flag belong to the flag
    that the message starts with; advice without numbers is left out.
    """
    text = in_flags(text)
    offers: list[Values] = []
    for part in re.split(r"\buse ", text)[-1].split(", or "):
        name, found = text.split()[0], dict[str, list[int]]()
        for token in re.findall(r"--[a-z-]+|\d+", part):
            if token.startswith("--"):
                name = token
            else:
                field = name.removeprefix("--").removeprefix("lighthouse-").replace("-", "_")
                found.setdefault(field, []).append(int(token))
        if found:
            offers += [dict(zip(found, values, strict=True)) for values in product(*found.values())]
    return offers


def assert_works(options: Values, seq_length: int | None, offer: Values) -> None:
    changed = options | offer
    seq_length = changed.pop("seq_length", seq_length)
    config = LighthouseConfig(**changed)
    if seq_length is not None:
        config.geometry(seq_length)


def test_advice_is_read_as_meant() -> None:
    text = "--lighthouse-budget 7 is odd: use 6 or 8, or --seq-length 1 --lighthouse-levels 2, or fewer --lighthouse-x."
    assert advice(text) == [{"budget": 6}, {"budget": 8}, {"seq_length": 1, "levels": 2}]


def test_flags() -> None:
    assert flag("tile_budget") == "--lighthouse-tile-budget"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"levels": 2}, id="fewest levels"),
        pytest.param({"pooling": 2}, id="least pooling"),
        pytest.param({"pooling": 3}, id="pooling need not be a power of two"),
        pytest.param({"tile_budget": 2}, id="smallest tile budget"),
        pytest.param({"tile_budget": 96}, id="tile budget need not be a power of two"),
        pytest.param({"budget": 128}, id="one tile"),
        pytest.param({"pin_first": False}, id="not pinned"),
    ],
)
def test_accepted(options: dict[str, object]) -> None:
    config = LighthouseConfig(**options)
    assert all(getattr(config, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        pytest.param({"levels": 1}, "at least 2", id="one level is dense"),
        pytest.param({"levels": -3}, "at least 2", id="negative levels"),
        pytest.param({"pooling": 1}, "at least 2", id="no pooling"),
        pytest.param({"tile_budget": 0}, "even and positive", id="empty tile budget"),
        pytest.param({"tile_budget": -2}, "even and positive", id="negative tile budget"),
        pytest.param({"tile_budget": 1}, "even and positive", id="tile budget 1"),
        pytest.param({"tile_budget": 3, "budget": 12}, "even and positive", id="odd tile budget"),
        pytest.param({"budget": 100}, "positive multiple", id="budget under one tile"),
        pytest.param({"budget": 200}, "positive multiple", id="budget between multiples"),
        pytest.param({"budget": 0}, "positive multiple", id="empty budget"),
        pytest.param({"budget": -128}, "positive multiple", id="negative budget"),
        pytest.param({"document_tile": 100}, "at least 2048", id="documents of less than a tile budget"),
        pytest.param({"document_tile": 4100}, "multiple of 16", id="tiles of documents that cut a window"),
        pytest.param({"whole_below": -1}, "not be negative", id="documents of negative length"),
    ],
)
def test_refused_with_advice_that_works(options: Values, rule: str) -> None:
    text = message(dict(options))
    (name, value) = next(iter(options.items()))
    assert text.startswith(f"{flag(name)} {value} ")
    assert rule in text
    assert advice(text)
    for offer in advice(text):
        assert_works(options, None, offer)


@pytest.mark.parametrize("tile_budget", [127, 101], ids="tile budget {}".format)
def test_advice_on_the_tile_budget_suits_the_budget(tile_budget: int) -> None:
    for offer in advice(message({"tile_budget": tile_budget})):
        assert_works({"tile_budget": tile_budget}, None, offer)


def test_unknown_scorer() -> None:
    text = message({"scorer": "vibes"})
    assert text.startswith("--lighthouse-scorer 'vibes' ")
    for name in re.findall(r"'(\w+)'", text.split("use ")[1]):
        assert LighthouseConfig(scorer=name).scorer == name


@pytest.mark.parametrize(
    "options",
    [{"levels": "3"}, {"pooling": 4.0}, {"budget": True}, {"tile_budget": None}, {"scorer": 1}, {"pin_first": 1}],
    ids=str,
)
def test_wrong_types_are_refused(options: dict[str, object]) -> None:
    ((name, value),) = options.items()
    rule = rf"{flag(name)} {value!r} must be of type (int|str|bool), not {type(value).__name__}"
    assert re.match(rule, message(options))


def test_frozen_and_checked_again_when_replaced() -> None:
    config = LighthouseConfig()
    with pytest.raises(FrozenInstanceError):
        config.levels = 1
    assert config.replace(levels=4) == LighthouseConfig(levels=4)
    with pytest.raises(ValueError, match=r"config\.levels 1 "):
        config.replace(levels=1)


def test_geometry_of_the_defaults() -> None:
    geometry = LighthouseConfig().geometry(98304)
    assert (geometry.tiles, geometry.window(2), geometry.entries(2)) == (12, 16, 6144)
    assert geometry.gathered_length == 6144 + 2 * 4 * 1536


SMALL: Values = {"levels": 3, "pooling": 2, "budget": 8, "tile_budget": 4}


@pytest.mark.parametrize("seq_length", [32, 40, 48, 4096], ids="N={}".format)
def test_lengths_accepted(seq_length: int) -> None:
    assert LighthouseConfig(**SMALL).geometry(seq_length).seq_length == seq_length


@pytest.mark.parametrize(
    ("options", "seq_length", "start"),
    [
        pytest.param(SMALL, 0, "--seq-length 0 must be a multiple of 8", id="no tokens"),
        pytest.param(SMALL, -32, "--seq-length -32 must be a multiple of 8", id="negative"),
        pytest.param(SMALL, 36, "--seq-length 36 must be a multiple of 8", id="windows do not divide among tiles"),
        pytest.param(SMALL, 1000001, "--seq-length 1000001 must be a multiple of 8", id="odd"),
        pytest.param(SMALL, 4, "--seq-length 4 must be a multiple of 8", id="one window"),
        pytest.param(SMALL, 24, "--lighthouse-budget 8 refines more windows than the 6 windows", id="too few windows"),
        pytest.param(SMALL | {"budget": 4}, 8, "--lighthouse-budget 4 refines more windows than the 2", id="one tile"),
        pytest.param({}, 24560, "--seq-length 24560 must be a multiple of 192", id="defaults"),
        pytest.param({}, 12288, "--lighthouse-budget 1536 refines more windows than the 768", id="defaults, too short"),
    ],
)
def test_lengths_refused_with_advice_that_works(options: Values, seq_length: int, start: str) -> None:
    text = message(dict(options), seq_length)
    assert text.startswith(start)
    assert any("seq_length" in offer for offer in advice(text))
    for offer in advice(text):
        assert_works(options, seq_length, offer)


@settings(derandomize=True, max_examples=400)
@given(*map(st.integers, (2, 2, 1, 1, 1), (4, 4, 4, 4, 700)))
def test_every_length_either_fits_or_is_refused_with_advice_that_works(
    levels: int, pooling: int, half: int, tiles: int, seq_length: int
) -> None:
    options = {"levels": levels, "pooling": pooling, "budget": 2 * half * tiles, "tile_budget": 2 * half}
    window = pooling ** (levels - 1)
    whole_tiles = seq_length % (tiles * window) == 0
    if whole_tiles and seq_length // tiles // window >= 2 * half:
        LighthouseConfig(**options).geometry(seq_length)
        return
    offers = advice(message(dict(options), seq_length))
    assert any(set(offer) == {"seq_length"} for offer in offers)
    for offer in offers:
        assert_works(options, seq_length, offer)


@pytest.mark.parametrize(
    ("options", "seq_length", "ranks"),
    [
        pytest.param({}, 99999999999, 1, id="no multiple"),
        pytest.param({}, 99999999999, 8, id="no multiple, ranks"),
        pytest.param({}, 192 * 10**9, 7, id="ranks that do not divide"),
        pytest.param({}, 192 * 10**9, 10**12, id="more ranks than windows"),
        pytest.param({"budget": 1 + 10**12}, None, 1, id="budget"),
        pytest.param({"budget": 2 * 10**12, "tile_budget": 127}, None, 1, id="tile budget"),
    ],
)
def test_a_length_with_digits_too_many_is_refused_after_few_tries(
    options: Values, seq_length: int | None, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def counted(to: int, unit: int, most: int, fits: Callable[[int], bool]) -> list[int]:
        return nearest(to, unit, most, lambda n: tried.append(n) or fits(n))

    nearest = module._nearest
    monkeypatch.setattr(module, "_nearest", counted)
    with pytest.raises(ValueError, match="use ") as refused:
        LighthouseConfig(**options).geometry(seq_length or 0, ranks)
    assert len(tried) <= 2 * (2 * TRIED + 1)  # of budgets and of ranks
    for offer in advice(str(refused.value)):
        left = {name: value for name, value in (options | offer).items() if name not in ("seq_length", "context_parallel_size")}
        if seq_length:
            length, size = offer.get("seq_length", seq_length), offer.get("context_parallel_size", ranks)
            LighthouseConfig(**left).geometry(length, size)
        else:
            LighthouseConfig(**left)


def test_ranks_are_advised_only_where_there_are_several() -> None:
    config = LighthouseConfig()
    with pytest.raises(ValueError, match=r"cp_group.size\(\) 7 .*: use cp_group.size\(\) 6 or 8"):
        config.geometry(98304, 7)
    assert "--context-parallel-size" not in message({}, 98305)


def test_fewer_levels_are_advised_only_where_they_help() -> None:
    text = message({"levels": 3, "pooling": 2, "budget": 2, "tile_budget": 2}, 7)
    assert "fewer --lighthouse-levels" not in text  # 7 has no whole windows of 2 tokens either
