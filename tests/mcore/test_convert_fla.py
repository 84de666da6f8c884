"""What Megatron answers of converted models of flash-linear-attention: their formulas in float64."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from tests.convert import fla_folders
from tests.convert.folders import convert, write
from tests.mcore.converted import megatron_logits, model_arguments
from tests.tolerances import assert_close


@pytest.mark.parametrize("name", fla_folders.CONFIGS)
def test_megatron_answers_as_the_formulas(name: str, tmp_path: Path) -> None:
    config = fla_folders.CONFIGS[name]
    tensors = fla_folders.weights(config)
    source = write(tmp_path / "hf", tensors, config)
    (source / "tokenizer.json").unlink()  # it is none
    convert("hf-to-megatron", source, tmp_path / "megatron")
    tokens = torch.randint(256, (64,), generator=torch.Generator().manual_seed(5))
    numpy.save(tmp_path / "tokens.npy", tokens.numpy())
    given = [*model_arguments(tmp_path / "megatron"), "--max-position-embeddings", "64"]
    found = torch.from_numpy(megatron_logits(tmp_path, tmp_path / "megatron", tmp_path / "tokens.npy", *given))
    assert_close(found, fla_folders.logits(tensors, config, tokens), "converted logits")
