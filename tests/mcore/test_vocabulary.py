"""Tokens beyond the vocabulary that the command line names: refused by the check before a job is queued, and by the run."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from megatron_lighthouse.launch.check import parse
from megatron_lighthouse.mcore.data import files, indexed
from tests.mcore.test_data_files import checked, write

NULL = ("--tokenizer-type", "NullTokenizer")


def test_a_token_beyond_the_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "x", [3, 300, 4])  # 300 is the greatest
    assert checked("--data-path", prefix, *NULL, "--vocab-size", "301") == 0
    assert checked("--data-path", prefix, *NULL, "--vocab-size", "300") == 1
    error = capsys.readouterr().err
    assert f"--data-path {prefix} has a token 300, beyond --vocab-size 300: use 301 or more" in error
    given = parse(["--train-data-path", prefix, *NULL, "--vocab-size", "257"])
    assert any("a token 300, beyond --vocab-size 257" in said for said in files.problems(given, Path))
    assert [*files.problems(given, Path, whole=False)] == []  # the first rank says it
    assert checked("--data-path", "1", prefix, "2", write(tmp_path / "y", [400]), *NULL, "--vocab-size", "301") == 1
    assert "y has a token 399" in capsys.readouterr().err


def test_a_vocabulary_of_a_tokenizer_is_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for the rows that the command line names."""
    prefix, theirs = write(tmp_path / "x", [300]), ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "me/it")
    assert checked("--data-path", prefix, *theirs, "--vocab-size", "257", "--split", "1,0,0") == 0
    assert checked("--data-path", prefix, *theirs, "--vocab-size", "257", "--padded-vocab-size", "257") == 1
    assert "beyond --padded-vocab-size 257" in capsys.readouterr().err


def test_a_token_that_is_negative(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "x", [40000], dtype=numpy.int16)
    assert checked("--data-path", prefix, *NULL, "--vocab-size", "50000") == 1
    assert "has a token -32768, and none is below 0" in capsys.readouterr().err


def test_a_great_file_is_looked_at_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "x", [1000])
    monkeypatch.setattr(indexed, "TOKENS", 10)
    idx, data = (tmp_path / f"x{suffix}" for suffix in (".idx", ".bin"))
    assert indexed.ids(idx, data) == (0, 999)  # both ends are
    monkeypatch.setattr(indexed, "PLACES", 100)
    assert indexed.ids(idx, data) == (0, 999)
    assert prefix


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--padded-vocab-size 256", "--padded-vocab-size 256 must be at least --vocab-size 257"),
        (
            "--padded-vocab-size 301 --tensor-model-parallel-size 2",
            "must be a multiple of --tensor-model-parallel-size 2: use 302",
        ),
        ("--null-tokenizer-eod-id 257", "must be below --vocab-size 257, and not negative: use 256"),
    ],
)
def test_sizes_that_contradict_each_other(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("--mock-data", *NULL, *words.split()) == 1
    assert says in capsys.readouterr().err
