"""What is no plain text behind --text-data and --held-out: refused by the check, by `make train`, by evaluation."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy
import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.mcore.data import plain
from megatron_lighthouse.recipe import two_stage
from megatron_lighthouse.recipe.presets import default_text
from megatron_lighthouse.recipe.readers import BYTES
from tests.launch.test_submit import words
from tests.mcore.harness import ROOT
from tests.mcore.test_data_files import write

LINES = "".join(json.dumps({"text": f"document {number}, of some length"}) + "\n" for number in range(40)).encode()
JSON_LINES = (
    ": JSON lines, whose braces and keys would be read as text. Give their texts alone; to train on them, `python -m mega"
)
BINARY = ": no plain text, for it has bytes of 0"
NO_TEXT = {
    "a.jsonl": (LINES, JSON_LINES),
    "a.ndjson": (b"not even JSON" * 99, JSON_LINES),
    "a.txt": (LINES, JSON_LINES),
    "a.json": (b"\n" + LINES, JSON_LINES),
    "a.jsonl.gz": (gzip.compress(numpy.random.default_rng(1).bytes(4000)), BINARY),
    "utf-16.txt": ("words ".encode("utf-16") * 200, BINARY),
}
TEXT = {
    "sets.txt": b'{}\n{"quoted"} is a set\n' * 99,
    "settings.json": json.dumps({"text": "words " * 300}).encode(),
    "pretty.json": json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1).encode(),
    "readme.md": b"# Words\n\n" + LINES,
    "braces.tex": b"{\\bf words}\n" * 200,
    "latin-1.txt": "wörds ".encode("latin-1") * 300,
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_the_check_refuses_it_wherever_it_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, says = NO_TEXT[name]
    for number in range(2):
        (tmp_path / f"{number}-{name}").write_bytes(content)
    (tmp_path / "words.md").write_bytes(b"words " * 300)
    paths = [str(tmp_path / f"{number}-{name}") for number in range(2)]
    own = ["--nodes", "2", "--gpus-per-node", "1", "--", *words("cpu-test"), "--text-data"]
    assert check.main([*own, *paths]) == 1
    assert f"--text-data {', '.join(paths)}{says}" in capsys.readouterr().err
    assert check.main([*own, str(tmp_path / "words.md")]) == 0
    with pytest.raises(ValueError, match="--held-out .*" + says[:20]):
        BYTES.read(paths[:1])


def test_a_folder_is_looked_through(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_bytes(LINES)
    (said,) = plain.problems("--text-data", [tmp_path])
    assert f"{tmp_path}/2.jsonl and 2 more: JSON lines" in said
    (tmp_path / "program.py").write_bytes(b"words " * 300)  # whose data the others are
    assert not [*plain.problems("--text-data", [tmp_path])]


def test_the_files_of_a_dataset_name_it(tmp_path: Path) -> None:
    """Its tokens are numbers: a byte of each is 0."""
    prefix = write(tmp_path / "corpus", (3000,))
    for suffix in (".bin", ".idx"):
        (said,) = plain.problems("--text-data", [Path(prefix + suffix)])
        assert f"(of an indexed dataset: --data-path {prefix} reads it, with its tokenizer)" in said


def test_text_is_taken(tmp_path: Path) -> None:
    for name, content in TEXT.items():
        (tmp_path / name).write_bytes(content)
    files = [*tmp_path.iterdir(), *map(Path, default_text()), *ROOT.glob("docs/*.md")]
    assert [*plain.problems("--text-data", files)] == []


def test_make_train_begins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_stage, "_gpus", lambda: 0)
    monkeypatch.setattr(two_stage, "_follow", lambda *_: pytest.fail("a stage has begun"))
    (tmp_path / "docs.jsonl").write_bytes(LINES * 9)
    (tmp_path / "tiny.txt").write_bytes(b"words " * 270)
    for name, says in (
        ("docs.jsonl", JSON_LINES),
        ("tiny.txt", "has 1,539 bytes for training, and a sequence of --seq-length"),
    ):
        assert two_stage.main(["--runs", str(tmp_path / "runs"), "--data", str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
