"""Evaluation of a checkpoint: the loss by position, held to Megatron's own validation, and the whole command."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from megatron_lighthouse.plots import read_scalars
from tests.mcore.harness import MODEL, ROOT, run
from tests.tolerances import assert_close

SEQUENCE = 256
HELD_OUT = 4 * SEQUENCE
"""Bytes; with the end of the document, four sequences that share their ends."""


def evaluate(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One process alone, or `ranks` under torchrun."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *torchrun, "megatron_lighthouse.recipe.evaluate", *MODEL, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@dataclass(frozen=True)
class Evaluated:
    """A run, and what two ranks made of its checkpoint."""

    validation: float
    """Megatron's validation loss on the text that was then evaluated."""
    out: Path
    printed: str
    checkpoint: Path
    text: Path
    """What the run read."""

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.out / name).open() as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluated")
    text = folder / "text"
    text.mkdir()
    words = (ROOT / "LICENSE").read_bytes()
    last = words[-HELD_OUT:]
    (text / "1.txt").write_bytes((words * 2)[: 19 * HELD_OUT])
    (text / "2.txt").write_bytes(last)  # the last twentieth: what Megatron validates on
    (folder / "held-out.txt").write_bytes(last)
    checkpoint = folder / "checkpoint"
    saved = ["--save", str(checkpoint), "--save-interval", "3", "--eval-iters", "2"]  # validates once, at the end
    run(folder / "run", "--attention", "lighthouse", *saved, data=["--text-data", str(text)])
    validation = read_scalars(folder / "run" / "tensorboard")["lm loss validation"][1][-1]
    options = ["--load", str(checkpoint), "--held-out", str(folder / "held-out.txt"), "--out", str(folder / "out")]
    lighthouse = ["--attention", "lighthouse"]  # as the run validated
    probe = ["--passkey-samples", "2", "--passkey-lengths", "128", "256", "--passkey-depths", "0", "1"]
    result = evaluate(2, *lighthouse, *options, *probe)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return Evaluated(float(validation), folder / "out", result.stdout, checkpoint, text)


def tiny(fused: bool) -> Any:
    """A model of random weights, the same for both: with Megatron's own attention, or with what an evaluation takes for it."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_lighthouse.mcore.fused import with_fused_attention

    torch.manual_seed(3)
    options: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    options |= {
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "add_bias_linear": False,
        "bias_dropout_fusion": False,
    }
    config = TransformerConfig(**options, init_method_std=0.3, masked_softmax_fusion=False)
    given = SimpleNamespace(transformer=config, transformer_layer_spec=lambda model_cfg: get_gpt_layer_local_spec())
    spec = with_fused_attention(given).transformer_layer_spec(given) if fused else get_gpt_layer_local_spec()
    model = GPTModel(config, spec, vocab_size=384, max_sequence_length=SEQUENCE, position_embedding_type="rope")
    return model.cuda().eval()


@pytest.mark.usefixtures("megatron")
def test_losses_and_the_next_token_are_those_of_megatrons_logits() -> None:
    import torch

    from megatron_lighthouse.mcore.fused import FusedAttention
    from megatron_lighthouse.recipe.trained import Trained

    tokens = numpy.random.default_rng(1).integers(257, size=65).astype(numpy.uint16)
    trained = Trained(Namespace(), 0, tiny(fused=True))
    assert isinstance(trained.model.decoder.layers[0].self_attention.core_attention, FusedAttention)
    with torch.no_grad():
        given = torch.from_numpy(tokens.astype(numpy.int64)).cuda()[None]
        logits = tiny(fused=False)(given, torch.arange(65).cuda()[None], None)[0].double().cpu()
    assert_close(trained.next_token(tokens), logits[-1], "float32")
    expected = -logits.log_softmax(-1)[torch.arange(64), torch.from_numpy(tokens[1:].astype(numpy.int64))]
    assert_close(trained.token_losses(tokens), expected, "float32")
    assert expected.std() > 0.1, "each position must have a loss of its own"


def test_the_mean_is_megatrons_validation_loss(evaluated: Evaluated) -> None:
    buckets = evaluated.rows("loss.csv")
    widths = numpy.array([int(row["stop"]) - int(row["start"]) for row in buckets])
    losses = numpy.array([float(row["loss"]) for row in buckets])
    assert widths.sum() == SEQUENCE
    assert_close(losses @ widths / SEQUENCE, evaluated.validation, "parallel loss")
    summary = json.loads((evaluated.out / "evaluation.json").read_text())
    assert_close(summary["loss"]["mean"], evaluated.validation, "parallel loss")
    assert (summary["loss"]["sequences"], summary["iteration"], summary["attention"]) == (4, 3, "lighthouse")


def test_errors_are_over_sequences(evaluated: Evaluated) -> None:
    buckets, sequences = evaluated.rows("loss.csv"), evaluated.rows("loss_by_sequence.csv")
    assert [row["starts_at"] for row in sequences] == ["0", "256", "512", "768"]
    assert {row["document"] for row in sequences} == {"0"}  # the text is one file
    for bucket in buckets:
        values = [float(row[bucket["start"]]) for row in sequences]
        assert len(set(values)) == 4, "each rank's sequences must be its own"
        assert_close(numpy.float64(bucket["standard_error"]), numpy.std(values, ddof=1) / 2, "float64")


def test_every_cell_of_the_probe_is_there(evaluated: Evaluated) -> None:
    cells = evaluated.rows("passkey.csv")
    assert len(cells) == 2 * 2 * 2
    assert {row["samples"] for row in cells} == {"2"}
    assert all(-20 < float(row["log_probability"]) < 0 for row in cells)
    questions = evaluated.rows("passkey_by_question.csv")
    assert [row["digit"] for row in questions] == ["0", "1"] * len(cells)
    for cell, first, second in zip(cells, questions[::2], questions[1::2], strict=True):
        assert all(first[name] == second[name] == cell[name] for name in ("filler", "length", "depth"))
        assert float(cell["accuracy"]) == (int(first["right"]) + int(second["right"])) / 2
    assert "passkey in noise" in evaluated.printed
    for name in ("loss.png", "passkey.png"):
        assert (evaluated.out / name).read_bytes().startswith(b"\x89PNG")


def test_what_was_trained_on_is_refused(evaluated: Evaluated, tmp_path: Path) -> None:
    options = ["--load", str(evaluated.checkpoint), "--out", str(tmp_path)]
    result = evaluate(1, *options, "--held-out", str(evaluated.text))
    assert result.returncode != 0
    assert "was read in training (--text-data of the checkpoint)" in result.stderr
