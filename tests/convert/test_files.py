"""What a conversion leaves behind: all of it, or nothing that a run could load."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lighthouse.convert import safetensors_files, to_megatron, torch_dist
from megatron_lighthouse.convert.__main__ import main
from megatron_lighthouse.convert.safetensors_files import Stored, Tensors
from megatron_lighthouse.convert.torch_dist import Part
from megatron_lighthouse.convert.torch_dist_reader import TorchDist
from tests.convert.folders import LLAMA, convert, refusal, rewrite, tensors_of, weights, write


def test_an_interruption_leaves_the_target_as_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    source = write(tmp_path / "hf", weights())
    convert("hf-to-megatron", source, tmp_path / "old")
    before = sorted(path for path in tmp_path.rglob("*"))

    class Stopped(BaseException):
        pass

    written = 0

    def stop(count: int) -> None:
        nonlocal written
        written += 1
        if written == 5:
            raise Stopped

    class Bar:
        update = staticmethod(stop)

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(to_megatron, "bar", Bar)
    for arguments in (["new"], ["old", "--force"]):
        written = 0
        with pytest.raises(Stopped):
            main(["hf-to-megatron", str(source), str(tmp_path / arguments[0]), *arguments[1:]])
        assert sorted(path for path in tmp_path.rglob("*")) == before


def test_what_a_kill_left_is_removed_by_the_next_start(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", weights())
    unfinished = tmp_path / "megatron.convert-unfinished/release"
    unfinished.mkdir(parents=True)
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    convert("hf-to-megatron", source, tmp_path / "megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_force_replaces_what_an_earlier_conversion_wrote(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", weights())
    changed = {name: tensor + 1 for name, tensor in weights().items()}
    other = write(tmp_path / "other", changed)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("hf-to-megatron", other, tmp_path / "megatron", "--force")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert main(["verify", str(other), str(tmp_path / "back")]) == 0
    assert main(["verify", str(source), str(tmp_path / "back")]) == 1


@pytest.mark.parametrize(("said", "head"), [(True, "none"), (True, "same"), (True, "other"), (False, "same"), (False, "other")])
def test_the_file_decides_whether_the_output_layer_is_the_embedding(said: bool, head: str, tmp_path: Path) -> None:
    tensors = weights()
    if head == "none":
        del tensors["lm_head.weight"]
    elif head == "same":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    source = write(tmp_path / "hf", tensors, {**LLAMA, "tie_word_embeddings": said})
    convert("hf-to-megatron", source, tmp_path / "megatron")
    tied = said and head != "other"
    assert ("--untie-embeddings-and-output-weights" in (tmp_path / "megatron/model.args").read_text()) == (not tied)
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert {*tensors_of(tmp_path / "back")} == {*tensors}
    assert main(["verify", str(source), str(tmp_path / "back")]) == 0
    # where they differ, transformers unties them with a warning: the export says what is so
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is tied


def test_a_padded_vocabulary_is_cut_and_a_small_one_said(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "hf", weights())
    for rows, kept in ((48, 40), (36, 36)):
        folder = tmp_path / f"megatron{rows}"
        convert("hf-to-megatron", source, folder)
        _with_rows(folder, rows)
        convert("megatron-to-hf", folder, tmp_path / f"back{rows}")
        back = tensors_of(tmp_path / f"back{rows}")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(back[name], weights()[name][:kept])
        assert json.loads((tmp_path / f"back{rows}/config.json").read_text())["vocab_size"] == kept
        assert ("config.json: vocab_size: 40 -> 36" in capsys.readouterr().out) == (rows == 36)


def _with_rows(folder: Path, rows: int) -> None:
    """Write the checkpoint again as a run of another padding would: in two parts, as of two tensor-parallel ranks."""
    stored = TorchDist(folder / "release")
    arguments = torch_dist.stored_arguments(folder / "release")
    parts = []
    for key, found in stored.tensors.items():
        whole = stored.read(key, [0] * len(found.size), found.size)
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            whole = torch.cat([whole, torch.full((8, 16), 9.0).bfloat16()])[:rows]
        for n, half in enumerate(whole.chunk(2, dim=-1)):
            offsets = (*[0] * (whole.ndim - 1), n * half.shape[-1])
            parts.append(Part(key, (*whole.shape,), offsets, (*half.shape,), whole.dtype, half.clone))
    for file in (folder / "release").iterdir():
        file.unlink()
    key = torch_dist.object_key("common_state", [])
    torch_dist.write(folder / "release", parts, {key: {"args": arguments}}, lambda count: None)


def test_files_are_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", weights())
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--shard-gb", "2e-6")
    files = [*(tmp_path / "back").glob("*.safetensors")]
    assert len(files) > 3
    named = json.loads((tmp_path / "back" / safetensors_files.INDEX).read_text())
    assert {*named["weight_map"].values()} == {file.name for file in files}
    before, after = weights(), tensors_of(tmp_path / "back")
    assert named["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("back", [False, True])
def test_no_more_than_a_few_tensors_are_in_memory(back: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """Torch's writer keeps a tensor of every name until its file is closed, so that files must be small."""
    made: list[weakref.ref[Any]] = []
    most = 0

    def read() -> torch.Tensor:
        nonlocal most
        most = max(most, sum(tensor() is not None for tensor in made))
        tensor = torch.ones(4, 8)
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(torch_dist, "FILE_BYTES", 256)  # two tensors
    if back:
        tensors = [Tensors(f"tensor{n}", Stored((4, 8), torch.float32), read) for n in range(20)]
        safetensors_files.write(tmp_path, tensors, 1000, lambda count: None)
    else:
        parts = [Part(f"tensor{n}", (4, 8), (0, 0), (4, 8), torch.float32, read) for n in range(20)]
        torch_dist.write(tmp_path, parts, {}, lambda count: None)
    assert len(made) == 20
    assert most <= 3


@pytest.mark.parametrize(("pattern", "named"), [("*-|*-", None), ("M-*-", "M-*-"), ("**--", "**--")])
def test_a_hybrid_model_of_a_gpt_s_layers(pattern: str, named: str | None, tmp_path: Path, capsys: Any) -> None:
    """Its layers are named one by one, an attention or an MLP each, and so is its last norm."""
    source = write(tmp_path / "hf", weights())
    folder = tmp_path / "megatron"
    convert("hf-to-megatron", source, folder)

    def named_by_symbols(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if "decoder.layers." not in key:
            return {key.replace("final_layernorm", "final_norm"): tensor}
        if "pre_mlp_layernorm" in key:  # written for models with experts; no run writes it
            return {}
        first = int("self_attention" not in key)
        return {key.replace("layers.", f"layers.{2 * n + first}."): layer for n, layer in enumerate(tensor)}

    rewrite(folder, named_by_symbols, hybrid_layer_pattern=pattern, num_layers=4)
    if named:
        assert f"--hybrid-layer-pattern {named}" in refusal(capsys, "megatron-to-hf", folder, tmp_path / "back")
    else:
        convert("megatron-to-hf", folder, tmp_path / "back")
        convert("verify", source, tmp_path / "back")
