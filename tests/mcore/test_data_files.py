"""Data that is not whole: refused by the check before a job is queued, and by the run, in words that name the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.launch.check import parse
from megatron_lighthouse.mcore.data import files, indexed
from tests.launch.test_submit import words

LITTLE = "--text-data has 1,710 bytes for training, and a sequence of --seq-length 2048 takes more: give more text, or"
HEADER = 34
"""Bytes before the lengths in an .idx."""


def write(prefix: Path, lengths: Sequence[int] = (3, 5, 4), dtype: type = numpy.uint16) -> str:
    """A dataset of documents of these lengths, by Megatron's own writer."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for number, length in enumerate(lengths):
        builder.add_document(numpy.arange(length) + number, [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def checked(*arguments: str, options: Sequence[str] = ()) -> int:
    own = ["--nodes", "2", "--gpus-per-node", "1", *options]
    return check.main([*own, "--", *words("cpu-test"), "--split", "1,0,0", *arguments])


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def put(idx: Path, at: int, number: int, form: str = "<q") -> None:
    found = bytearray(idx.read_bytes())
    struct.pack_into(form, found, at, number)
    idx.write_bytes(found)


DAMAGE = [
    ("x.bin", lambda path: cut(path, 0), ".bin holds no token"),
    ("x.bin", lambda path: cut(path, 20), ".bin has 20 bytes, and its .idx says 24"),
    ("x.idx", lambda path: cut(path, 0), ".idx has 0 bytes, which are no index"),
    ("x.idx", lambda path: cut(path, 90), ".idx has 90 bytes, and 3 sequences in 3 documents take 102"),
    ("x.idx", lambda path: put(path, 0, 7), ".idx begins with b'"),
    ("x.idx", lambda path: put(path, 9, 2), ".idx says version 2 and dtype 8"),
    ("x.idx", lambda path: put(path, 17, 9, "<B"), ".idx says version 1 and dtype 9"),
    ("x.idx", lambda path: put(path, 18, 2), ".idx counts 2 sequences, and its last document ends with sequence"),
    ("x.idx", lambda path: put(path, 18, 0), ".idx counts no sequence"),
    ("x.idx", lambda path: put(path, HEADER + 4, 900, "<i"), ".bin has 24 bytes, and its .idx says 1,806"),
    ("x.idx", lambda path: put(path, HEADER + 4, -1, "<i"), ".idx has a negative length or offset"),
    ("x.idx", lambda path: put(path, HEADER + 12 + 8, 9000), ".bin has 24 bytes, and its .idx says 9,010"),
]


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGE, ids=[says for _, _, says in DAMAGE])
def test_a_damaged_dataset(
    name: str, damage: Callable[[Path], None], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path / "x")
    assert checked("--data-path", prefix) == 0
    damage(tmp_path / name)
    assert checked("--data-path", prefix) == 1
    error = capsys.readouterr().err
    assert f"--data-path {prefix}: {prefix}{says}" in error
    assert any("--train-data-path" in said for said in files.problems(parse(["--train-data-path", prefix]), Path))


def test_great_indices_are_held_to_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "x")
    put(tmp_path / "x.idx", HEADER + 4, -1, "<i")
    idx, data = tmp_path / "x.idx", tmp_path / "x.bin"
    assert indexed.problem(idx, data)
    assert indexed.problem(idx, data, whole=False) is None
    monkeypatch.setattr(indexed, "WHOLE", 64)
    assert indexed.problem(idx, data) is None
    assert checked("--data-path", prefix) == 0
    first = indexed.fingerprint(idx)
    put(idx, indexed.read_header(idx).ends, 1)
    assert indexed.fingerprint(idx) != first
    cut(data, 20)
    assert indexed.problem(idx, data, whole=False) == ".bin has 20 bytes, and its .idx says 24"


@pytest.mark.parametrize("dtype", [numpy.uint8, numpy.int32, numpy.int64])
def test_every_dtype_of_megatron(dtype: type, tmp_path: Path) -> None:
    assert checked("--data-path", write(tmp_path / "x", dtype=dtype)) == 0
    cut(tmp_path / "x.bin", 12 * numpy.dtype(dtype).itemsize - 1)
    assert checked("--data-path", str(tmp_path / "x")) == 1


def test_every_list_of_data_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, listed, splits = write(tmp_path / "x"), tmp_path / "list", tmp_path / "splits"
    without = ["--nodes", "2", "--gpus-per-node", "1", "--", *words("cpu-test")]
    for text, status, says in (
        (f"1 {good}", 0, ""),
        (f"1 {good} 2 {tmp_path}/no", 1, f"--data-args-path {listed}: {tmp_path}/no has no {tmp_path}/no.bin and no"),
        ("", 1, "names no dataset"),
        (f"1 {good} {good} {good}", 1, "weights for some datasets"),
        (f"0 {good} 0 {good}", 1, "weights that are no shares"),
        (f"-1 {good} nan {good}", 1, "weights that are no shares"),
        (f"\ufeff{good}", 1, "begins with a byte order mark, which Megatron reads as text"),
        (f"{good}\r\n", 0, ""),
    ):
        listed.write_text(text)
        assert checked("--data-args-path", str(listed)) == status, text
        assert says in capsys.readouterr().err
    for found, status, says in (
        (json.dumps({"train": good, "valid": [good], "test": None}), 0, ""),
        (json.dumps({"train": [good], "valid": f"{tmp_path}/no", "test": None}), 1, f"valid: {tmp_path}/no has no"),
        (json.dumps({"train": [good]}), 1, "does not name all splits"),
        (json.dumps({"train": [1], "valid": None, "test": None}), 1, "has for train neither null nor words"),
        ("{", 1, "is no JSON"),
        ("", 1, "is no JSON"),
    ):
        splits.write_text(found)
        assert check.main([*without, "--per-split-data-args-path", str(splits)]) == status, found
        assert says in capsys.readouterr().err
    assert checked("--data-args-path", str(tmp_path)) == 1
    assert f"--data-args-path {tmp_path} cannot be read (Is a directory)" in capsys.readouterr().err


def test_weights_and_prefixes_come_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron would read a number as the prefix of a dataset."""
    one, other = write(tmp_path / "x"), write(tmp_path / "y")
    for blend in (("0.5", one, "0.5"), (one, "0.5"), (one, ".5", other, "5e-1"), ("0.5", "0.5", one, other), ("1", one, other)):
        assert checked("--data-path", *blend) == 1
        says = f"--data-path {' '.join(blend)} has a number where Megatron reads a prefix: weights and prefixes come in pairs"
        assert says in capsys.readouterr().err
    for blend in (("0.5", one, "0.5", other), (one, other), (one,), (write(tmp_path / "nan"), one, other)):
        assert checked("--data-path", *blend) == 0, capsys.readouterr().err


def test_a_dataset_may_be_called_as_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "2024")
    write(tmp_path / "nan")
    for blend in (("./2024", "nan", "nan"), ("1", "./2024", "2", "nan"), ("2024",)):
        assert checked("--data-path", *blend) == 0


def test_what_the_data_options_ask_of_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "x")
    sequences = tmp_path / "sequences.json"
    sequences.write_text(json.dumps({prefix: [3, 5]}))
    storage = ("--object-storage-cache-path", str(tmp_path), "--no-mmap-bin-files")
    for arguments, says in (
        (("--data-path", prefix, "--mock-data"), "--data-path and --mock-data are each the data of a run"),
        (("--train-data-path", prefix), "--split 1,0,0 does not go with --train-data-path"),
        (("--data-path", prefix, "--split", "969,30,1"), "leaves none of the 3 sequences of"),
        (
            ("--data-path", prefix, "--eval-iters", "2"),
            "nothing to validate on, which --eval-iters 2 asks for: use --eval-iters 0",
        ),
        (("--data-path", prefix, "--split", "a,b"), "--split a,b must be up to three numbers from 0 on"),
        (("--data-path", prefix, "--split", "0,0,0"), "one of them above it: use 969,30,1"),
        (("--data-path", prefix, "--per-dataset-sequences-path", str(sequences)), "has other counts of"),
        (("--data-path", "s3://bucket/x"), "is in object storage: add --object-storage-cache-path FOLDER --no-mmap-bin-files."),
        (("--data-path", "msc://profile/x", *storage), "is in object storage: add --enable-msc."),
    ):
        assert checked(*arguments) == 1, arguments
        assert says in capsys.readouterr().err
    assert checked("--data-path", "s3://bucket/x", *storage) == 0
    assert checked("--data-path", "s3://bucket/x", *storage, options=["--sees", "/data"]) == 0
    assert checked("--data-path", "1", "msc://p/x", "1", prefix, *storage, "--enable-msc") == 0
    assert checked("--data-path", prefix, "--split", "2,1,0") == 0
    assert checked("--data-path", "1", prefix, "--split", "969,30,1") == 1
    assert checked("--data-path", prefix, prefix, prefix, "--split", "969,30,1") == 0  # each is read once, Megatron fills none


def test_a_container_sees_what_a_list_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, listed = write(tmp_path / "x"), tmp_path / "in" / "list"
    listed.parent.mkdir()
    listed.write_text(prefix)
    assert checked("--data-args-path", str(listed), options=["--sees", str(listed.parent)]) == 1
    assert f"{prefix} is not in the container (IMAGE)" in capsys.readouterr().err


def test_text_and_tokenizers_are_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "short").write_text("short")
    (tmp_path / "little").write_text("words " * 300)
    for arguments, says in (
        (("--text-data", f"{tmp_path}/empty"), "holds no text"),
        (("--text-data", f"{tmp_path}/folder"), "holds no text"),
        (("--text-data", f"{tmp_path}/short"), "holds 5 bytes of text: give at least 1000"),
        (("--text-data", f"{tmp_path}/little", "--seq-length", "2048", "--max-position-embeddings", "2048"), LITTLE),
        (("--text-data", f"{tmp_path}/no"), f"--text-data {tmp_path}/no is not there"),
        (("--mock-data", "--tokenizer-model", f"{tmp_path}/empty"), f"--tokenizer-model {tmp_path}/empty is empty"),
        (("--mock-data", "--tokenizer-model", f"{tmp_path}/folder"), f"--tokenizer-model {tmp_path}/folder is empty"),
        (("--mock-data", "--vocab-file", f"{tmp_path}/empty"), f"--vocab-file {tmp_path}/empty is empty"),
        (("--mock-data", "--pretrained-checkpoint", f"{tmp_path}/no"), f"--pretrained-checkpoint {tmp_path}/no is not there"),
        (
            ("--mock-data", "--save", f"{tmp_path}/short/run"),
            f"/short/run cannot be made: {tmp_path}/short is no",
        ),
    ):
        own = ["--nodes", "2", "--gpus-per-node", "1", "--", *words("cpu-test")]
        assert check.main([*own, *arguments]) == 1, arguments
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Llama2Tokenizer", "SentencePieceTokenizer"])
def test_a_folder_where_a_tokenizer_reads_a_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(path: Path) -> str:
        assert checked("--mock-data", "--tokenizer-type", kind, "--tokenizer-model", str(path)) == 1
        return capsys.readouterr().err

    model = tmp_path / "tokenizer.model"
    (tmp_path / "config.json").write_text("{}")
    assert f"is a folder without *.model, and --tokenizer-type {kind} reads a file: give the model's." in said(tmp_path)
    whole = tmp_path / "tokenizer.json"
    whole.write_text("{}")
    assert "reads: use --tokenizer-type HuggingFaceTokenizer.\n" in said(tmp_path)
    assert f"use --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path}.\n" in said(whole)
    model.write_text("x")
    assert f"reads a file: give {model}.\n" in said(tmp_path)
    assert "is no model of SentencePiece's" in said(model)
    model.write_bytes(b"\n\x0e\n\x05<unk>" + bytes(12))  # its first piece
    assert checked("--mock-data", "--tokenizer-type", kind, "--tokenizer-model", str(model)) == 0
    assert "is not there: give a path that all nodes see.\n" in said(tmp_path / "none")  # the hub has none for it
    whole.write_text('{"model": ')
    assert checked("--mock-data", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path)) == 1
    assert f"--tokenizer-model {tmp_path}: its tokenizer.json is no JSON (" in capsys.readouterr().err
    whole.write_text("{}")
    assert checked("--mock-data", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path)) == 0


def test_a_tokenizer_of_ranks_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Megatron asserts once it builds it."""
    own = ["--mock-data", "--tokenizer-type", "TikTokenizer", "--tokenizer-model"]
    for name in ("x.tiktoken", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert checked(*own, str(tmp_path / "x.tiktoken")) == 1
    assert "must be a .json of ranks with --tokenizer-type TikTokenizer: give that file.\n" in capsys.readouterr().err
    assert checked(*own, str(tmp_path)) == 1
    assert "give that file, or use --tokenizer-type HuggingFaceTokenizer.\n" in capsys.readouterr().err


def test_two_sources_are_said_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what else would have to go: bytes are no vocabulary of other data, and a second round would say the rest."""
    prefix, text = write(tmp_path / "x", (3, 4000)), tmp_path / "a.txt"
    text.write_bytes(b"a" * 4000)
    both = ["--data-path", prefix, "--text-data", str(text)]
    for more, too in (
        ([], "--split 1,0,0"),
        (["--tokenizer-type", "SFTTokenizer"], "--split 1,0,0 and --tokenizer-type SFTTokenizer"),
    ):
        assert checked(*both, *more) == 1
        said = capsys.readouterr().err
        assert (
            f"--data-path and --text-data are each the data of a run: leave all but one out, with --text-data {too} too."
            in said
        )
        assert "--padded-vocab-size" not in said
    own = ["--nodes", "2", "--gpus-per-node", "1", "--", *words("cpu-test")]
    assert check.main([*own, *both[2:]]) == 0, capsys.readouterr().err
    assert checked(*both[:2]) == 0, capsys.readouterr().err
