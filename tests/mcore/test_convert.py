"""Checkpoints to Megatron and back: what the models answer, and whether every number came back, before and after training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy
import pytest
import torch

from megatron_lighthouse.convert.arguments import namespace
from tests.convert.folders import convert, tensors_of
from tests.mcore.converted import RUN, finish, megatron_logits, model_arguments, start, transformers
from tests.mcore.harness import TEXT
from tests.mcore.hf_models import MODELS
from tests.tolerances import assert_close

LIGHTHOUSE = """
    --attention lighthouse --lighthouse-levels 2 --lighthouse-budget 8 --lighthouse-tile-budget 4 --lighthouse-dense-first 1
    --lighthouse-dense-last 1 --seed 7 --global-batch-size 2
""".split()
ROWS = ["--padded-vocab-size", "384"]
"""As --text-data makes them; the Llama here has 300."""
YARN = """
    --position-embedding-type yarn --rotary-scaling-factor 4 --yarn-original-max-position-embeddings 256
    --max-position-embeddings 1024
""".split()
TENSOR = ["--tensor-model-parallel-size", "2"]
PIPELINE_AND_EXPERT = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]
RUNS: dict[str, tuple[int, list[str], list[str]]] = {
    "llama": (1, [], []),
    "qwen3": (2, YARN, TENSOR),  # by the scorer that it takes itself
    "qwen3-moe": (4, [], ["--lighthouse-scorer", "dilated", *PIPELINE_AND_EXPERT]),
}
"""By model: on how many processes, what is new of the model, and how it is trained."""


@pytest.fixture(scope="module")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face folders."""
    folder = tmp_path_factory.mktemp("models")
    transformers("make", folder)
    return folder


@pytest.fixture(scope="module")
def converted(hf_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of `hf_models` as Megatron's."""
    folder = tmp_path_factory.mktemp("megatron")
    for name in MODELS:
        convert("hf-to-megatron", hf_models / name, folder / name)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_megatron_answers_as_transformers(name: str, hf_models: Path, converted: Path, tmp_path: Path) -> None:
    given = model_arguments(converted / name)
    logits = megatron_logits(tmp_path, converted / name, hf_models / "tokens.npy", *given)
    assert_close(logits, numpy.load(hf_models / name / "logits.npy"), "converted logits")


def test_the_arguments_are_what_megatron_reads(converted: Path) -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for name in MODELS:
        words = model_arguments(converted / name)
        read = vars(parser.parse_args(words))
        for argument, value in vars(namespace(words)).items():
            assert (argument, read[argument]) == (argument, value), name
            assert type(read[argument]) is type(value), (name, argument)


@pytest.mark.parametrize("name", MODELS)
def test_every_number_comes_back(name: str, hf_models: Path, converted: Path, tmp_path: Path) -> None:
    convert("megatron-to-hf", converted / name, tmp_path / "hf")
    before, after = tensors_of(hf_models / name), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key
    assert json.loads((hf_models / name / "config.json").read_text()) == json.loads((tmp_path / "hf/config.json").read_text())
    generation = "generation_config.json"
    assert (hf_models / name / generation).read_bytes() == (tmp_path / "hf" / generation).read_bytes()
    convert("verify", hf_models / name, tmp_path / "hf")
    convert("verify", hf_models / name, converted / name)


@pytest.fixture(scope="module")
def exported(hf_models: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By model: `run/checkpoint` after three iterations, and `hf`, with what transformers answers in `hf/logits.npy`."""
    folder = tmp_path_factory.mktemp("exported")
    for name, (ranks, model, how) in RUNS.items():
        given = [*RUN, *model_arguments(converted / name), *model, *ROWS, *LIGHTHOUSE, *how, *TEXT]
        run = str(folder / name / "run/checkpoint")
        given += (
            ["--pretrained-checkpoint", str(converted / name), "--load", run, "--save", run]
            if name == "llama"
            else [*("--load", str(converted / name), "--save", run)]
        )
        given += ["--data-cache-path", str(folder / name / "data")]
        finish(start(folder / name / "run", "megatron_lighthouse.pretrain_gpt", *given, ranks=ranks))
    for name in RUNS:
        convert("megatron-to-hf", folder / name / "run/checkpoint", folder / name / "hf")
    transformers("logits", hf_models / "tokens.npy", *(folder / name / "hf" for name in RUNS))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_an_export_answers_as_the_dense_model(
    name: str, hf_models: Path, converted: Path, exported: Path, tmp_path: Path
) -> None:
    _, model, _ = RUNS[name]
    given = [*model_arguments(converted / name), *model, *ROWS, "--finetune", "--no-load-optim", "--no-load-rng"]
    logits = megatron_logits(tmp_path, exported / name / "run/checkpoint", hf_models / "tokens.npy", *given)
    answer = numpy.load(exported / name / "hf/logits.npy")
    assert abs(answer - numpy.load(hf_models / name / "logits.npy")).max() > 0.1, "nothing was learnt"
    assert_close(answer, logits[:, : answer.shape[1]], "converted logits")


def test_config_json_says_what_is_new(hf_models: Path, exported: Path) -> None:
    for name in RUNS:
        before, after = (
            json.loads((folder / "config.json").read_text()) for folder in (hf_models / name, exported / name / "hf")
        )
        new = {field for field in {*before, *after} if before.get(field) != after.get(field)}
        assert new == ({"max_position_embeddings", "rope_parameters"} if name == "qwen3" else set()), name
        assert after["vocab_size"] == MODELS[name][1].get("vocab_size", 384)
    after = json.loads((exported / "qwen3/hf/config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1000000.0}
    assert after["rope_parameters"] == {**rope, "beta_fast": 32.0, "beta_slow": 1.0}
    assert after["max_position_embeddings"] == 1024
