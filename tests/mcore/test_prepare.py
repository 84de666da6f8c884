"""Text and JSON lines as an indexed dataset: read again by Megatron, and taken by the check and by training."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.mcore.data import prepare
from tests.mcore.harness import MODEL

NUMBERS = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "300"]
DOCUMENTS = [[1, 2, 3], [4, 5], [6], [7, 8]]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The documents in a text, in JSON lines with an empty one, and in some that are packed."""
    texts = [" ".join(map(str, document)) for document in DOCUMENTS]
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (texts[1], "", texts[2])) + "\n\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as packed:
        packed.write(json.dumps({"text": texts[3], "source": 1}))
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.jsonl.gz")]


@pytest.fixture
def _deaf() -> None:
    """SIGTERM is this process's own to heed: its workers must end all the same. Every test begins with the default."""
    signal.signal(signal.SIGTERM, lambda *_: None)


@pytest.mark.usefixtures("_deaf")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_megatron_reads_what_is_written(
    files: list[str], workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = str(tmp_path / "out")
    assert prepare.main(["--input", *files, "--output", prefix, "--workers", workers, *NUMBERS]) == 0
    assert f"4 documents, 12 tokens; 1 without text left out. Train with --data-path {prefix}" in capsys.readouterr().out
    dataset = IndexedDataset(prefix)
    assert [dataset[n].tolist() for n in range(len(dataset))] == [[*document, 299] for document in DOCUMENTS]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.jsonl", "c.jsonl.gz", "out.bin", "out.idx"}
    assert prepare.main(["--input", files[0], "--output", prefix, *NUMBERS]) == 2
    assert "out.idx is there already" in capsys.readouterr().err


def test_without_an_end(files: list[str], tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = str(tmp_path / "out")
    assert prepare.main(["--input", files[0], "--output", prefix, "--no-end-of-document", *NUMBERS]) == 0
    dataset = IndexedDataset(prefix)  # what it gives is a view of its file
    assert dataset[0].tolist() == DOCUMENTS[0]


@pytest.mark.parametrize(
    ("line", "more", "says"),
    [
        ('{"text": "1"', "", "b.jsonl, line 1: no JSON"),
        ('{"content": "1"}', "", "no text under 'text', it has content: give --json-key"),
        ("[1]", "", "it is no object"),
        ('{"text": "words"}', "", "--tokenizer-type makes no tokens of 'words' (invalid literal"),
        ("", "--num-layers 4", "--num-layers is no flag of a tokenizer"),
        ("", "--tokenizer-typ x", "did you mean --tokenizer-type?"),
        ("", "--tokenizer-type HuggingFaceTokenizer --tokenizer-model ./nowhere", "./nowhere is not there"),
        ("", "--input nowhere", "--input nowhere is no file"),
        ("", "--workers 0", "--workers 0 must be at least 1"),
        ("", f"--output {__file__}/out", f"{__file__} is no folder: name another"),
    ],
)
def test_what_is_refused(line: str, more: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is left behind."""
    (tmp_path / "b.jsonl").write_text(line + "\n")
    given = ["--input", str(tmp_path / "b.jsonl"), "--output", str(tmp_path / "out"), *NUMBERS, *more.split()]
    assert prepare.main(given) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["b.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("b.jsonl", "", "b.jsonl holds no text: give files that hold some. Nothing is written."),
        ("b.jsonl", '{"text": ""}\n' * 3, "b.jsonl holds no text"),
        ("b.txt", "", "b.txt holds no text"),
        (
            "b.txt",
            '{"text": "1"}\n' * 3,
            "b.txt holds JSON lines, and would be one document by its name: let it end in .jsonl or",
        ),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_dataset_of_nothing_is_not_written(
    name: str, content: str, says: str, workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor one of JSON's own syntax."""
    (tmp_path / name).write_text(content)
    given = ["--input", str(tmp_path / name), "--output", str(tmp_path / "out"), "--workers", workers, *NUMBERS]
    assert prepare.main(given) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--worker 2", "--worker is not a known flag: did you mean --workers?"),
        ("--json-keys content", "--json-keys is not a known flag: did you mean --json-key?"),
        ("--tokenizer-modl x", "--tokenizer-modl is not a known flag: did you mean --tokenizer-model?"),
        ("--vocab-size 300k", "--vocab-size 300k must be a whole number, in digits alone: write 300000."),
        ("--num-layers 4", "--num-layers is no flag of a tokenizer: leave it out."),
        ("--worker 2 --num-layers 4", "--num-layers is no flag of a tokenizer: leave it out."),
    ],
)
def test_all_that_is_wrong_is_said_at_once(words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag may be one of this command's own; and no wrong word hides files and folders that cannot be."""
    given = ["--input", str(tmp_path / "nowhere"), "--output", f"{__file__}/out", *NUMBERS, *words.split()]
    assert prepare.main(given) == 2
    said = capsys.readouterr().err
    assert all(line in said for line in (says, f"{__file__} is no folder", "nowhere is no file"))


def test_the_kind_of_each_file_is_settled_before_any_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are named at once, and neither a tokenizer is built nor a file written for those before."""
    wrong = {
        "lines.txt": ('{"text": "1"}\n' * 3).encode(),
        "other.jsonl": b'\n{"content": "1"}\n',
        "no.jsonl": b"1 2\n",
        "latin.txt": "1 é".encode("latin-1"),
        "cut.txt.gz": b"1 2",
        "spoilt.txt.gz": gzip.compress(b"1 2 3 4")[:10] + b"\xff" * 20,
    }
    for name, content in {"good.txt": b"1 2", "good.jsonl": b'{"text": "3"}\n', **wrong}.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(prepare, "_build", lambda _: pytest.fail("it is too early"))
    inputs = [str(path) for path in sorted(tmp_path.iterdir())]
    assert prepare.main(["--input", *inputs, "--output", str(tmp_path / "out"), *NUMBERS]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(wrong)
    assert all(any(name in line for line in said) for name in wrong), said
    assert len(inputs) == len([*tmp_path.iterdir()])


def test_a_pipe_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody writes to it: to open it would wait for ever."""
    os.mkfifo(pipe := tmp_path / "pipe.jsonl")
    assert prepare.main(["--input", str(pipe), "--output", str(tmp_path / "out"), *NUMBERS]) == 2
    assert f"--input {pipe} is no file" in capsys.readouterr().err


def test_a_folder_that_nobody_may_write_to(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare.os, "access", lambda *_: False)  # root may write anywhere
    assert prepare.main(["--input", *files, "--output", str(tmp_path / "new" / "out"), *NUMBERS]) == 2
    assert f"nothing can be written in {tmp_path}: name another folder" in capsys.readouterr().err


def test_the_check_takes_it(files: list[str], tmp_path: Path) -> None:
    prefix = str(tmp_path / "new" / "folder" / "out")
    assert prepare.main(["--input", *files, "--output", prefix, *NUMBERS]) == 0
    assert (
        check.main(["--nodes", "1", "--gpus-per-node", "1", "--", *MODEL, "--data-path", prefix, "--split", "1,1,0", *NUMBERS])
        == 0
    )
