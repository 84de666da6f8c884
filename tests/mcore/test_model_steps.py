"""benchmarks/model_steps.py: the runs that an H200 is to time can start, as far as Megatron's parser and rules tell."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from tests.mcore.harness import without

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from model_steps import ATTENTION, MODELS, command

SIZES = argparse.Namespace(tiny=False, seq_length=98304, layers=4, steps=5, out=Path("out"))
H200 = ["--nodes", "1", "--gpus-per-node", "1", "--arch", "hopper", "--device", "h200", "--"]


def words_of(model: str, attention: str) -> list[str]:
    """Of its run, with no data for the random tokens that it would write."""
    _, _, module, *words = command(model, attention, SIZES)
    assert module == "megatron_lighthouse.pretrain_gpt"
    return [*without(words, "--data-path", "--data-cache-path"), "--mock-data"]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("model", MODELS)
def test_each_run_can_start(model: str, attention: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([*H200, *words_of(model, attention)]) == 0, capsys.readouterr().err
    assert f"98304 tokens, {attention}" in capsys.readouterr().out


def test_the_biases_of_experts_are_what_stopped_gpt_oss(capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in words_of("gpt-oss", "dense") if word != "--no-bias-dropout-fusion"]
    assert check.main([*H200, *words]) == 1
    assert "add --no-bias-dropout-fusion" in capsys.readouterr().err
