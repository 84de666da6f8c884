"""The entry point: its data, its ways to name the attention, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from megatron_lighthouse.config import flag
from megatron_lighthouse.mcore.settings import ENVIRONMENT, LighthouseSettings, settings_from
from tests.mcore.harness import TEXT, Processes, run

OPTIONS = "--lighthouse-budget 8 --lighthouse-tile-budget 4 --lighthouse-dense-first 1 --lighthouse-dense-last 1"
NUMBERS = "--tokenizer-type NullTokenizer --vocab-size 257 --padded-vocab-size 384".split()


def test_spec_is_the_same_as_attention(tmp_path: Path) -> None:
    by_name = run(tmp_path / "attention", "--attention", "lighthouse")
    by_spec = run(tmp_path / "spec", "--spec", "megatron_lighthouse.mcore.spec", "lighthouse")
    assert by_spec.losses == by_name.losses
    (tmp_path / "file").touch()
    nowhere = ["--lighthouse-selection-map", str(tmp_path / "file" / "picture.png")]
    unpinned = run(tmp_path / "unpinned", "--attention", "lighthouse", "--no-lighthouse-pin-first", *nowhere)
    assert unpinned.losses[1] != by_name.losses[1]
    assert "picture.png could not be drawn" in unpinned.log  # and the run ends well


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert settings_from(None) == LighthouseSettings()
    monkeypatch.setenv(ENVIRONMENT, OPTIONS + " --no-lighthouse-pin-first")
    settings = settings_from(None)
    assert (settings.config.budget, settings.config.tile_budget, settings.dense_first, settings.dense_last) == (8, 4, 1, 1)
    assert not settings.config.pin_first
    monkeypatch.setenv(ENVIRONMENT, "--lighthouse-bugdet 8")
    with pytest.raises(SystemExit):
        settings_from(None)


def test_indexed_data_is_what_text_data_writes(tmp_path: Path) -> None:
    from_text = run(tmp_path / "text", "--attention", "lighthouse")
    (written,) = (tmp_path / "text" / "data").glob("text-*-train.idx")
    prefix = str(written.with_suffix(""))
    data = ["--train-data-path", prefix, "--valid-data-path", prefix, *NUMBERS]
    assert run(tmp_path / "indexed", "--attention", "lighthouse", data=data).losses == from_text.losses


def test_mock_data_and_a_picture_of_each_layer(tmp_path: Path) -> None:
    options = ["--mock-data", *NUMBERS, "--lighthouse-selection-map", str(tmp_path / "selection-{layer}.png")]
    losses = run(tmp_path / "run", "--attention", "lighthouse", data=options).losses
    assert numpy.isfinite(list(losses.values())).all()
    pictures = [tmp_path / f"selection-{layer}.png" for layer in (2, 3)]
    assert sorted(tmp_path.glob("*.png")) == pictures
    first, second = (picture.read_bytes() for picture in pictures)
    assert first.startswith(b"\x89PNG")
    assert first != second


def test_help_names_every_option(tmp_path: Path) -> None:
    processes = Processes(tmp_path, 1, ["--help"])
    assert processes.wait() == [0]
    text = processes.log.read_text()
    names = ["levels", "pooling", "budget", "tile_budget", "scorer", "pin_first", "dense_first", "dense_last"]
    for name in ["--attention", "--no-lighthouse-pin-first", TEXT[0], *map(flag, names)]:
        assert name in text, name
