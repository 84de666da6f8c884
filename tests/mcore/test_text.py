"""Plain text as Megatron's indexed datasets."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest

from megatron_lighthouse.mcore.data import text
from tests.mcore.harness import ROOT, run

pytestmark = pytest.mark.usefixtures("megatron")


def documents(prefix: str) -> list[bytes]:
    """The documents of a written dataset, without their last token; fails if that is not the end of a document."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = []
    for tokens in IndexedDataset(prefix):
        assert tokens[-1] == text.END_OF_DOCUMENT
        found.append(bytes(tokens[:-1].astype("uint8")))
    return found


def test_training_and_validation_are_the_whole_text(tmp_path: Path) -> None:
    contents = [bytes(range(256)) * 8, "ünïcode\n".encode() * 100, b"x" * 3000]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_bytes(content)
    (tmp_path / "image.png").write_bytes(b"not text")
    train, valid = text.write_datasets([str(tmp_path)], str(tmp_path / "out"))
    assert documents(train)[:2] == contents[:2]
    assert b"".join(documents(train) + documents(valid)) == b"".join(contents)
    total = sum(map(len, contents))
    assert sum(map(len, documents(valid))) == total // 20


def test_one_file_gives_both_parts(tmp_path: Path) -> None:
    (tmp_path / "book").write_bytes(b"words " * 400)
    train, valid = text.write_datasets([str(tmp_path / "book")], str(tmp_path / "out"))
    assert len(documents(train)) == len(documents(valid)) == 1


def test_written_once_and_again_when_the_text_changes(tmp_path: Path) -> None:
    file, out = tmp_path / "a.txt", str(tmp_path / "out")
    file.write_bytes(b"a" * 2000)
    first = text.write_datasets([str(file)], out)
    stamp = Path(f"{first[0]}.bin").stat().st_mtime_ns
    assert text.write_datasets([str(file)], out) == first
    assert Path(f"{first[0]}.bin").stat().st_mtime_ns == stamp
    file.write_bytes(b"b" * 2001)
    assert text.write_datasets([str(file)], out) != first


def test_paths_are_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint says what was read, to whoever evaluates it from another folder."""
    (tmp_path / "a.txt").write_bytes(b"a" * 2000)
    (tmp_path / "link").symlink_to(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    args = text.add_arguments(argparse.ArgumentParser()).parse_args(["--text-data", "a.txt", "link", "no/../b"])
    assert args.text_data == [str(tmp_path.resolve() / name) for name in ("a.txt", "a.txt", "b")]
    names = [text.write_datasets(paths, "out") for paths in (["a.txt"], args.text_data[:1])]
    assert names[0] == names[1], "data that was written before is found again"


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--text-data .*missing does not exist"):
        text.text_files([tmp_path / "missing"])
    with pytest.raises(ValueError, match="holds no text"):
        text.text_files([tmp_path])
    (tmp_path / "short.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match="holds 5 bytes of text: give at least 1000"):
        text.write_datasets([str(tmp_path)], str(tmp_path / "out"))


def test_a_short_text_trains_where_nothing_validates(tmp_path: Path) -> None:
    """A twentieth of the text, which is for validation, is less than one sequence."""
    file = tmp_path / "short.txt"
    file.write_bytes((ROOT / "LICENSE").read_bytes()[:4000])
    data = ["--text-data", str(file)]
    one = run(tmp_path / "run", "--train-iters", "1", "--attention", "dense", data=data)
    assert list(one.losses) == [1]
    assert "each is read about" not in one.log
    two = run(
        tmp_path / "two", "--train-iters", "40", "--exit-interval", "1", "--eval-iters", "1", "--attention", "dense", data=data
    )
    assert two.log.count("--text-data has 3,801 tokens for training: each is read about 5 times.") == 1
    assert two.log.count("--text-data has 201 tokens for validation: each is read about ") == 1


def test_a_run_goes_on_behind_more_validation_than_it_asks_for(tmp_path: Path) -> None:
    """Jobs that evaluated more often than the next is to: Megatron would find no sample left, and assert one."""
    file = tmp_path / "short.txt"
    file.write_bytes((ROOT / "LICENSE").read_bytes()[:4000])
    data, kept = ["--text-data", str(file)], str(tmp_path / "checkpoints")
    often = ["--train-iters", "2", "--eval-interval", "1", "--eval-iters", "20", "--attention", "dense"]
    run(tmp_path / "first", *often, "--save", kept, "--save-interval", "2", data=data)
    on = ["--train-iters", "4", "--eval-interval", "100", "--eval-iters", "20", "--attention", "dense"]
    on += ["--override-opt-param-scheduler"]
    assert [*run(tmp_path / "on", *on, "--load", kept, data=data).losses] == [3, 4]


def test_byte_entropy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abcd" * 5000)
    train, _ = text.write_datasets([str(tmp_path)], str(tmp_path / "out"))
    # four equally frequent bytes; the one end of document adds a little
    assert math.log(4) < text.byte_entropy(train) < math.log(4) + 0.01
