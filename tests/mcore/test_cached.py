"""Data written again under its name: Megatron's cached order of samples is not read for it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest

from megatron_lighthouse.mcore.data import cached
from megatron_lighthouse.mcore.refusal import RefusedError
from tests.mcore.harness import MODEL, ROOT, Processes, run
from tests.mcore.test_data_files import cut, write
from tests.mcore.test_pretrain import NUMBERS

FEW, MANY, SAME_SIZE = (20, 20, 20), (20, 20, 20, 20), (30, 10, 20)


def samples(prefixes: Sequence[str], cache: Path | None) -> list[list[int]]:
    """What Megatron reads of a blend: 24 samples of 8 tokens."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=(list(prefixes), [1.0] * len(prefixes)),
        split="1,0,0",
        path_to_cache=str(cache) if cache else None,
        tokenizer=MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=128),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [24, 0, 0], lambda: True, config).build()
    return [train[number]["tokens"].tolist() for number in range(24)]


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("known", [True, False], ids=["manifest", "times"])
@pytest.mark.parametrize("lengths", [FEW[:2], MANY, SAME_SIZE], ids=["fewer", "more", "same-size"])
def test_a_changed_dataset_is_ordered_again(lengths: tuple[int, ...], known: bool, tmp_path: Path) -> None:
    """Held to what is read of it without any cache from before."""
    cache, other = tmp_path / "cache", write(tmp_path / "y", FEW)
    prefix = write(tmp_path / "x", FEW)
    assert cached.refresh([prefix, other], str(cache), None) == []
    before = samples([prefix, other], cache)
    kept = samples([other], cache)
    if not known:
        (cache / cached.MANIFEST).unlink()
    files = set(cache.iterdir())
    assert cached.refresh([prefix, other], str(cache), None) == []
    assert samples([prefix, other], cache) == before
    write(tmp_path / "x", lengths)
    later = max(path.stat().st_mtime_ns for path in files) + 10**9
    os.utime(f"{prefix}.idx", ns=(later, later))
    (cache / cached.MANIFEST).unlink() if not known else None
    assert cached.refresh([prefix, other], str(cache), None) == [prefix]
    assert samples([prefix, other], cache) == samples([prefix, other], tmp_path / "new")
    assert cached.refresh([prefix, other], str(cache), None) == []
    alone = [path for path in files if json.dumps(prefix) not in path.read_text(errors="replace")]
    assert samples([other], cache) == kept
    assert any(path.name.endswith(cached.DESCRIPTION) and path.exists() for path in alone)  # of the other dataset alone


@pytest.mark.usefixtures("megatron")
def test_a_cache_beside_its_dataset(tmp_path: Path) -> None:
    """Where there is no --data-cache-path; and after a move of both."""
    prefix = write(tmp_path / "x", FEW)
    cached.refresh([prefix], None, None)
    samples([prefix], None)
    write(tmp_path / "x", MANY)
    assert cached.refresh([prefix], None, None) == [prefix]
    found = samples([prefix], None)
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("x*"):
        path.rename(tmp_path / "moved" / path.name)
    moved = str(tmp_path / "moved" / "x")
    assert cached.refresh([moved], None, None) == []
    assert samples([moved], None) == found


@pytest.mark.usefixtures("megatron")
def test_touching_the_files_changes_nothing(tmp_path: Path) -> None:
    cache, prefix = tmp_path / "cache", write(tmp_path / "x", FEW)
    cached.refresh([prefix], str(cache), None)
    samples([prefix], cache)
    write(tmp_path / "x", FEW)
    assert cached.refresh([prefix], str(cache), None) == []


@pytest.mark.usefixtures("megatron")
def test_an_order_that_is_cut_off_is_built_again(tmp_path: Path) -> None:
    cache, prefix = tmp_path / "cache", write(tmp_path / "x", FEW)
    before = samples([prefix], cache)
    for name in ("*-shuffle_index.npy", "*-dataset_index.npy"):
        for path in cache.glob(name):
            cut(path, path.stat().st_size - 1)
    assert cached.refresh([prefix], str(cache), None) == []
    assert samples([prefix], cache) == before


@pytest.mark.usefixtures("megatron")
def test_what_cannot_be_built_again_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, prefix = tmp_path / "cache", write(tmp_path / "x", FEW)
    cached.refresh([prefix], str(cache), None)
    samples([prefix], cache)
    write(tmp_path / "x", MANY)
    with pytest.raises(RefusedError, match=r"of an older .*/x, and --dataloader-fast-cache-load builds none"):
        cached.refresh([prefix], str(cache), "--dataloader-fast-cache-load")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("unlink", "write_text"):  # root may write anywhere
        monkeypatch.setattr(Path, name, denied)
    with pytest.raises(RefusedError, match=r"cannot be removed \(Permission denied\): use another --data-cache-path"):
        cached.refresh([prefix], str(cache), None)
    write(tmp_path / "x", FEW)
    assert cached.refresh([prefix], str(cache), None) == []  # what lets itself be read alone is enough where nothing changed


def test_a_run_resumes_on_changed_data(tmp_path: Path) -> None:
    """On two ranks, with fewer documents, which were an IndexError; and one of a file that is cut off ends with status 2."""
    prefix = write(tmp_path / "x", [1000] * 8, numpy.uint8)
    data = ["--data-path", prefix, "--split", "1,0,0", *NUMBERS]
    folder = ["--save", str(tmp_path / "run/checkpoints"), "--load", str(tmp_path / "run/checkpoints"), "--save-interval", "9"]
    run(tmp_path / "run", *folder, "--train-iters", "9", "--exit-interval", "1", ranks=2, data=data)
    write(tmp_path / "x", [1000] * 4, numpy.uint8)
    resumed = run(tmp_path / "run", *folder, "--train-iters", "9", ranks=2, data=data)
    assert resumed.log.count(f"the data of {prefix} has changed since its order of samples was cached") == 1
    assert "training goes on at sample 2 of the new order" in resumed.log
    cut(tmp_path / "x.bin", 3999)
    for ranks in (1, 2):
        processes = Processes(tmp_path / "cut", ranks, [*MODEL, *data])
        assert 2 in processes.wait()
        assert f"--data-path {prefix}: {prefix}.bin has 3,999 bytes, and its .idx says 4,000" in processes.log.read_text()


def test_a_run_resumes_on_changed_text(tmp_path: Path) -> None:
    """Said once, and not where the text is as it was; whatever folder the data made of it is in."""
    file = tmp_path / "text.txt"
    file.write_bytes((ROOT / "LICENSE").read_bytes())
    save = ["--save", str(tmp_path / "checkpoints"), "--load", str(tmp_path / "checkpoints"), "--save-interval", "9"]
    words = ["--attention", "dense", "--train-iters", "9", *save]
    logs = []
    for number in range(3):
        if number == 2:
            file.write_bytes(file.read_bytes()[::-1] + b"more")
        data = ["--text-data", str(file)]
        logs.append(run(tmp_path / str(number), *words, "--exit-interval", str(1 + number), ranks=2, data=data).log)
    said = "--text-data has other files, sizes or times than when the checkpoint was saved: training goes on at sample 4 of"
    assert [log.count("--text-data has other") for log in logs] == [0, 0, 1]
    assert said in logs[2]
