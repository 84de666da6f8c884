"""The entry point: its data, its loss, its ways to name the attention, and what it leaves behind."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line.settings import ENVIRONMENT, LighthouseSettings, add_arguments, settings_from
from tests.mcore.harness import TEXT, Processes, Run, refused, run

OPTIONS = "--lighthouse-budget 8 --lighthouse-tile-budget 4 --lighthouse-dense-first 1 --lighthouse-dense-last 1"
NUMBERS = "--tokenizer-type NullTokenizer --vocab-size 257 --padded-vocab-size 384".split()


def test_spec_is_the_same_as_attention(tmp_path: Path, baseline: Callable[..., Run]) -> None:
    by_name = baseline("--attention", "lighthouse")
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
    with pytest.raises(ValueError, match=r"LIGHTHOUSE_ARGS '--lighthouse-bugdet 8' .* put them on the command line"):
        settings_from(add_arguments(ArgumentParser()).parse_args([]))


def test_indexed_data_is_what_text_data_writes(tmp_path: Path, baseline: Callable[..., Run]) -> None:
    from_text = baseline("--attention", "lighthouse")
    (written,) = (from_text.folder / "data").glob("text-*-train.idx")
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


def test_what_megatron_asserts_is_a_refusal_too(tmp_path: Path) -> None:
    """With the status of Lighthouse's own, for which pretrain.sbatch does not queue a job again."""
    log = refused(tmp_path, "--decoder-seq-length", "262144")
    assert "Megatron refuses the arguments: assert args.max_position_embeddings >= args.decoder_seq_length (" in log
    assert "initialized tensor model parallel" not in log


def test_help_names_every_option(tmp_path: Path) -> None:
    processes = Processes(tmp_path, 1, ["--help"])
    assert processes.wait() == [0]
    text = processes.log.read_text()
    names = ["levels", "pooling", "budget", "tile_budget", "scorer", "pin_first", "dense_first", "dense_last"]
    for name in ["--attention", "--no-lighthouse-pin-first", TEXT[0], *map(flag, names)]:
        assert name in text, name


class Names(Namespace):
    """Arguments whose values are their own names."""

    def __getattr__(self, name: str) -> Any:
        return f"args.{name}"


SAME = """
    split multiple_validation_sets full_validation num_dataset_builder_threads mmap_bin_files reset_position_ids
    reset_attention_mask eod_mask_loss object_storage_cache_path mid_level_dataset_surplus allow_ambiguous_pad_tokens
    context_parallel_size data_parallel_size
""".split()
RENAMED = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "inter_document_masking": "dataloader_inter_document_masking",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
}


def test_the_datasets_are_those_that_the_arguments_ask_for(
    megatron: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not handed on would take Megatron's default in silence."""
    from megatron_lighthouse.mcore.data import datasets as data

    (tmp_path / "sequences.json").write_text('{"book": 3}')
    args = Names(per_dataset_sequences_path=tmp_path / "sequences.json", tensor_model_parallel_size=2, sequence_parallel=True)
    args.sft = args.validates_conversations = False
    monkeypatch.setattr(data, "GPTDatasetConfig", lambda **given: given)
    monkeypatch.setattr(data, "get_blend_and_blend_per_split", lambda args: ("blend", "per split"))
    monkeypatch.setattr(data, "build_tokenizer", lambda args: "tokenizer")
    assert data._dataset_config(args) == {
        **{name: f"args.{argument}" for name, argument in [*zip(SAME, SAME, strict=True), *RENAMED.items()]},
        **{"blend": "blend", "blend_per_split": "per split", "tokenizer": "tokenizer"},
        **{"sequences_per_dataset": {"book": 3}, "sequence_parallel_size": 2},
    }


@pytest.mark.parametrize(("per_token", "loss", "divisor"), [(False, (257 / 2 + 32) * 3, 2), (True, 289, 3)])
def test_the_loss_counts_what_the_mask_counts(
    per_token: bool, loss: float, divisor: int, megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Summed in fp32, whatever the dtype of the losses; of each sequence alike, or of each token."""
    from megatron_lighthouse.mcore.loop import forward_step as step

    options = Namespace(check_for_nan_in_loss_and_grad=False, calculate_per_token_loss=per_token, context_parallel_size=3)
    monkeypatch.setattr(step, "get_args", lambda: options)
    losses = torch.tensor([[1.0, 2.0, 256.0], [8.0, 16.0, 32.0]], dtype=torch.bfloat16)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    found, by, logged = step.loss_function(mask, step.token_weights(mask), losses)
    assert (found.item(), by.item(), logged["lm loss"].tolist()) == (loss, divisor, [289.0, 3.0])
    assert (found.dtype, by.dtype) == (torch.float32, torch.int)


def test_a_loss_of_no_token_is_zero(megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.mcore.loop import forward_step as step

    options = Namespace(check_for_nan_in_loss_and_grad=False, calculate_per_token_loss=False, context_parallel_size=1)
    monkeypatch.setattr(step, "get_args", lambda: options)
    none = torch.zeros(2, 4)
    loss, divisor, logged = step.loss_function(none, step.token_weights(none), torch.ones(2, 4))
    total, counted = logged["lm loss"]
    assert (loss.item(), divisor.item(), (total / counted).item()) == (0, 2, 0)
