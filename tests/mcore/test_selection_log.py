"""The telemetry's arguments: which layers, which pictures, and what is refused. A run with it is in test_stage.py."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse.mcore.command_line.arguments import with_lighthouse_arguments
from megatron_lighthouse.mcore.command_line.settings import settings_from
from megatron_lighthouse.mcore.loop import selection_log

NEW = {"load": None, "finetune": False, "ckpt_step": None, "seq_length": 256, "rank": 0}
"""Megatron's arguments of a run of 256 tokens that goes on from no checkpoint."""


def arguments(*words: str, **more: Any) -> Namespace:
    parsed = with_lighthouse_arguments()(ArgumentParser()).parse_args(words)
    return Namespace(**{**vars(parsed), "num_layers": 12, "tensorboard_dir": "log", "cuda_graph_impl": "none", **NEW, **more})


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ("", (3, 6, 10)),
        ("--lighthouse-dense-first 5", (6, 8, 10)),
        ("--lighthouse-dense-first 8", (9, 10)),
        ("--lighthouse-dense-first 9", (10,)),
        ("--lighthouse-dense-first 10", ()),
        ("--lighthouse-telemetry-layers 7 4 7", (7, 4)),
    ],
)
def test_layers(words: str, layers: tuple[int, ...]) -> None:
    assert selection_log.watched_layers(arguments(*words.split())) == layers


@pytest.mark.parametrize(
    ("words", "name", "pictures"),
    [
        ("", None, {}),
        ("", "map.png", {3: "map.png"}),
        ("", "{layer}/map-{layer}.png", {3: "3/map-3.png", 6: "6/map-6.png", 10: "10/map-10.png"}),
        ("--lighthouse-telemetry-layers 7 4", "map.png", {7: "map.png"}),
        ("--lighthouse-dense-first 10", "map.png", {}),
    ],
)
def test_pictures(words: str, name: str | None, pictures: dict[int, str]) -> None:
    from megatron_lighthouse.mcore.loop.pretrain import pictures_of

    given = arguments(*words.split(), lighthouse_selection_map=name)
    assert pictures_of(given) == {layer: Path(path) for layer, path in pictures.items()}


EVERY = "--lighthouse-telemetry-interval 5"


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        ("--lighthouse-telemetry-interval -1", {}, "--lighthouse-telemetry-interval -1 must not be negative: use 0"),
        ("--lighthouse-telemetry-layers 2 4 11", {}, "--lighthouse-telemetry-layers 2 11: the Lighthouse layers are 3 to 10"),
        ("--lighthouse-telemetry-layers 3 4", {}, "--lighthouse-telemetry-layers 3 4 says what .* add .*-interval ITERS"),
        (EVERY, {"tensorboard_dir": None}, f"{EVERY} has nowhere to log to: add --tensorboard-dir DIR or --wandb-project"),
        (EVERY, {"cuda_graph_impl": "local"}, f"{EVERY} cannot look into the graphs of --cuda-graph-impl local"),
    ],
)
def test_what_is_refused(words: str, more: dict[str, Any], message: str) -> None:
    given = arguments(*words.split(), **more)
    with pytest.raises(ValueError, match=message):
        selection_log.check(given, settings_from(given))


@pytest.mark.parametrize("more", [{}, {"tensorboard_dir": None, "wandb_project": "name"}], ids=str)
def test_what_is_not_refused(more: dict[str, Any]) -> None:
    given = arguments(*EVERY.split(), "--lighthouse-telemetry-layers", "3", "10", **more)
    assert list(selection_log.problems(given, settings_from(given))) == []
    drawn = arguments("--lighthouse-telemetry-layers", "3", lighthouse_selection_map="{layer}.png")
    assert list(selection_log.problems(drawn, settings_from(drawn))) == []
    off = arguments(tensorboard_dir=None, cuda_graph_impl="local")
    assert list(selection_log.problems(off, settings_from(off))) == []


def test_both_writers_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.training

    written: list[Any] = []
    tensorboard = Namespace(add_scalar=lambda *scalar: written.append(scalar))
    wandb = Namespace(log=lambda *scalars: written.append(scalars))
    monkeypatch.setattr(selection_log, "averages", lambda layers, levels: {"a": 1.0, "b": 2.0})
    monkeypatch.setattr(megatron.training, "get_tensorboard_writer", lambda: None)
    monkeypatch.setattr(megatron.training, "get_wandb_writer", lambda: None)
    selection_log.log([3], 2, 7)
    assert written == []
    monkeypatch.setattr(megatron.training, "get_tensorboard_writer", lambda: tensorboard)
    monkeypatch.setattr(megatron.training, "get_wandb_writer", lambda: wandb)
    selection_log.log([3], 2, 7)
    assert written == [("a", 1.0, 7), ("b", 2.0, 7), ({"a": 1.0, "b": 2.0}, 7)]
