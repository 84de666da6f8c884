"""Evaluation of a checkpoint: losses held to Megatron's own validation and logits, hindsight, and the whole command."""

from __future__ import annotations

import csv
import json
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from megatron_lighthouse.launch.torchrun import own_environment, torchrun
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.mcore.command_line.documents import FLAG
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe import hindsight
from tests.mcore.forks import warm
from tests.mcore.harness import MODEL, ROOT, Processes, run
from tests.tolerances import assert_close

SEQUENCE = 256
TOKENS = numpy.random.default_rng(2).integers(257, size=1000).astype(numpy.uint16)
HELD_OUT = 4 * SEQUENCE
"""Bytes; with the end of the document, four sequences that share their ends."""
COMMAND = "megatron_lighthouse.recipe.evaluate"


def evaluate(ranks: int, *arguments: str, model: Sequence[str] = MODEL) -> subprocess.CompletedProcess[str]:
    """What the command ends with on `ranks` forked processes; stdout and stderr are one."""
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(Path(folder), ranks, [*model, *arguments], COMMAND)
        statuses = processes.wait()
        log = processes.log.read_text(errors="replace")
    return subprocess.CompletedProcess(COMMAND, max(statuses, key=abs), log, log)


def evaluate_by_torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**own_environment(), **warm(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*torchrun(ranks), "-m", COMMAND, *MODEL, *arguments], capture_output=True, text=True, env=environment
    )


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
    probe += ["--variables-samples", "2", "--variables-lengths", "256", "--variables-hops", "0", "2"]
    result = evaluate_by_torchrun(2, *lighthouse, *options, *probe, "--hindsight-samples", "5")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return Evaluated(float(validation), folder / "out", result.stdout, checkpoint, text)


def tiny(fused: bool, budget: int | None = None, short: bool = False) -> Any:
    """A model of random weights, the same for all: with Megatron's own attention, or with what an evaluation takes for it.

    With `budget`, of the 16 windows of 4 tokens in 64, all layers use Lighthouse in two tiles; `short`: of short documents too.
    """
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_lighthouse.mcore.attention.fused_spec import with_fused_attention
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse

    torch.manual_seed(3)
    options: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    options |= {
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
    }
    config = TransformerConfig(**options, init_method_std=0.3, masked_softmax_fusion=False)
    given = SimpleNamespace(transformer=config, transformer_layer_spec=lambda model_cfg: get_gpt_layer_local_spec())
    spec = with_fused_attention(given).transformer_layer_spec(given) if fused else get_gpt_layer_local_spec()
    if budget:
        lighthouse = LighthouseConfig(levels=2, pooling=4, budget=budget, tile_budget=budget // 2)
        if short:
            lighthouse = lighthouse.replace(whole_below=8, document_tile=32)
        spec = with_lighthouse(spec, LighthouseSettings(lighthouse, dense_first=0, dense_last=0, rope="mean"))
    model = GPTModel(config, spec, vocab_size=384, max_sequence_length=SEQUENCE, position_embedding_type="rope")
    return model.cuda().eval()


@pytest.mark.usefixtures("megatron")
def test_losses_and_the_next_token_are_those_of_megatrons_logits() -> None:
    import torch

    from megatron_lighthouse.mcore.attention.fused import FusedAttention
    from megatron_lighthouse.recipe.trained import Trained

    tokens = numpy.random.default_rng(1).integers(257, size=65).astype(numpy.uint16)
    trained = Trained(Namespace(), 0, tiny(fused=True))
    assert isinstance(trained.model.decoder.layers[0].self_attention.core_attention, FusedAttention)
    with torch.no_grad():
        given = torch.from_numpy(tokens.astype(numpy.int64)).cuda()[None]
        logits = tiny(fused=False)(given, torch.arange(65).cuda()[None], None)[0].double().cpu()
    rows: list[int] = []
    seen = trained.model.output_layer.register_forward_hook(lambda _, __, out: rows.append(len(out[0])))
    assert_close(trained.next_token(tokens), logits[-1], "float32")
    seen.remove()
    assert rows == [1], "logits of all tokens would not fit at long context"
    expected = -logits.log_softmax(-1)[torch.arange(64), torch.from_numpy(tokens[1:].astype(numpy.int64))]
    assert_close(trained.token_losses(tokens), expected, "float32")
    assert expected.std() > 0.1, "each position must have a loss of its own"


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(("budget", "least"), [(None, 0), (16, 0), (4, 0.05)], ids=["dense", "all selected", "lighthouse"])
def test_hindsight_is_nothing_where_later_tokens_choose_nothing(budget: int | None, least: float) -> None:
    from megatron_lighthouse.recipe.evaluate import hindsight_by_distance
    from megatron_lighthouse.recipe.trained import Trained

    args = Namespace(seq_length=64, hindsight_samples=16, hindsight_seed=5)
    found = hindsight_by_distance(Trained(args, 0, tiny(fused=True, budget=budget)), TOKENS)
    differences = numpy.array([row["difference"] for row in found["distances"]])
    assert len(differences) == 7  # 0, 1, 2, …, 32
    if least:
        assert numpy.abs(differences).max() > least
    else:
        assert_close(differences, numpy.zeros(7), "float32")
    assert found["difference"] == differences[0]


@pytest.mark.usefixtures("megatron")
def test_hindsight_ends_where_the_tile_ends() -> None:
    """Tiles hold 32 tokens: from the last of one on, another future changes nothing; from its middle on, it does."""
    import torch

    from megatron_lighthouse.recipe.trained import Trained

    model = tiny(fused=True, budget=4)
    trained, tokens, other = Trained(Namespace(), 0, model), TOKENS[:65], TOKENS[500:564]

    def losses(position: int) -> Any:
        inputs = numpy.concatenate([tokens[: position + 1], other[position + 1 :]])
        found = hindsight.losses(hindsight.Sample(tokens, position, inputs), trained.token_losses)
        with torch.no_grad():  # the same from Megatron's logits
            given = torch.from_numpy(numpy.stack([tokens[:-1], inputs]).astype(numpy.int64)).cuda()
            logits = model(given, torch.arange(64).cuda()[None], None).double().cpu()
        at = position - numpy.array(hindsight.distances(64))
        expected = -logits.log_softmax(-1)[:, at, torch.from_numpy(tokens[at + 1].astype(numpy.int64))]
        assert_close(found[:, at >= 0], expected[:, at >= 0], "float32")
        return found[:, at >= 0]

    assert_close(*losses(31), "float32")
    true, changed = losses(47)  # distances 0 to 8 are in the second tile, 16 and 32 in the first
    assert_close(true[5:], changed[5:], "float32")
    assert (numpy.abs(true - changed)[:5] > 1e-3).any()


def test_the_mean_is_megatrons_validation_loss(evaluated: Evaluated) -> None:
    buckets = evaluated.rows("loss.csv")
    widths = numpy.array([int(row["stop"]) - int(row["start"]) for row in buckets])
    losses = numpy.array([float(row["loss"]) for row in buckets])
    assert widths.sum() == SEQUENCE
    assert_close(losses @ widths / SEQUENCE, evaluated.validation, "parallel loss")
    summary = json.loads((evaluated.out / "evaluation.json").read_text())
    assert_close(summary["loss"]["mean"], evaluated.validation, "parallel loss")
    assert (summary["loss"]["sequences"], summary["iteration"], summary["attention"]) == (4, 3, "lighthouse")
    assert summary["lighthouse_layers"] == 2


def test_errors_are_over_sequences(evaluated: Evaluated) -> None:
    buckets, sequences = evaluated.rows("loss.csv"), evaluated.rows("loss_by_sequence.csv")
    assert [row["starts_at"] for row in sequences] == ["0", "256", "512", "768"]
    assert {row["document"] for row in sequences} == {"0"}  # the text is one file
    for bucket in buckets:
        values = [float(row[bucket["start"]]) for row in sequences]
        assert len(set(values)) == 4, "each rank's sequences must be its own"
        assert_close(numpy.float64(bucket["standard_error"]), numpy.std(values, ddof=1) / 2, "float64")


@pytest.mark.parametrize(
    ("probe", "axis", "count", "said"),
    [("passkey", "depth", 2 * 2 * 2, "passkey in noise"), ("variables", "hops", 2 * 2, "variable tracking in noise")],
)
def test_every_cell_of_a_probe_is_there(evaluated: Evaluated, probe: str, axis: str, count: int, said: str) -> None:
    cells = evaluated.rows(f"{probe}.csv")
    assert len(cells) == count
    assert {row["samples"] for row in cells} == {"2"}
    assert all(-20 < float(row["log_probability"]) < 0 for row in cells)
    questions = evaluated.rows(f"{probe}_by_question.csv")
    assert [row["digit"] for row in questions] == ["0", "1"] * len(cells)
    for cell, first, second in zip(cells, questions[::2], questions[1::2], strict=True):
        assert all(first[name] == second[name] == cell[name] for name in ("filler", "length", axis))
        assert float(cell["accuracy"]) == (int(first["right"]) + int(second["right"])) / 2
    assert said in evaluated.printed
    found = json.loads((evaluated.out / "evaluation.json").read_text())[probe]["fillers"]
    assert {name: one["samples"] for name, one in found.items()} == dict.fromkeys(("noise", "classic"), count)
    for name in ("loss.png", f"{probe}.png"):
        assert (evaluated.out / name).read_bytes().startswith(b"\x89PNG")


def test_hindsight_is_written(evaluated: Evaluated) -> None:
    rows = evaluated.rows("hindsight.csv")
    text = numpy.append(numpy.frombuffer((ROOT / "LICENSE").read_bytes()[-HELD_OUT:], numpy.uint8), 256).astype(numpy.uint16)
    positions = [hindsight.draw(number, text, SEQUENCE, 1234).position for number in range(5)]
    expected = [(d, sum(position >= d for position in positions)) for d in hindsight.distances(SEQUENCE)]
    assert [(int(row["distance"]), int(row["samples"])) for row in rows] == [row for row in expected if row[1]]
    for row in rows:
        losses = [float(row[name]) for name in ("loss_true_future", "loss_other_future")]
        assert 1 < losses[0] < 10
        assert_close(losses[1] - losses[0], float(row["difference"]), "float64")
    assert any(abs(float(row["difference"])) > 1e-3 for row in rows)
    summary = json.loads((evaluated.out / "evaluation.json").read_text())["hindsight"]
    assert {name: str(summary[name]) for name in rows[0]} == rows[0]
    assert f"hindsight {summary['difference']:.4f} ± " in evaluated.printed
    assert (evaluated.out / "hindsight.png").read_bytes().startswith(b"\x89PNG")


def test_hindsight_is_refused_before_the_model_is_built(evaluated: Evaluated, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_bytes(b"a" * 510)
    others = ["--loss-sequences", "0", "--passkey-samples", "0", "--hindsight-samples", "1"]
    result = evaluate(1, "--load", str(evaluated.checkpoint), "--out", str(tmp_path), "--held-out", str(short), *others)
    assert result.returncode != 0
    assert "the held-out text has 511 tokens: --hindsight-samples needs at least 512, twice --seq-length 256" in result.stderr
    built = "number of parameters on"  # Megatron's word of a model
    assert built in evaluated.printed
    assert built not in result.stdout


@pytest.mark.usefixtures("megatron")
def test_what_was_not_asked_for_is_none(tmp_path: Path) -> None:
    from megatron_lighthouse.recipe.evaluate import measure
    from megatron_lighthouse.recipe.trained import Trained

    trained = {"load": "ckpt", "attention": "dense", "lighthouse_layers": 0, "lighthouse_rope": "last"}
    trained["lighthouse_causal_selection"] = False
    asked = Namespace(out=tmp_path, loss_sequences=0, hindsight_samples=0, **trained)
    measure(Trained(asked, 3, tiny(fused=True)), TOKENS, [])
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert [summary[name] for name in ("loss", "passkey", "variables", "hindsight")] == [None] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_what_was_trained_on_is_refused(evaluated: Evaluated, tmp_path: Path) -> None:
    options = ["--load", str(evaluated.checkpoint), "--out", str(tmp_path)]
    result = evaluate(1, *options, "--held-out", str(evaluated.text))
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert "was read in training (--text-data of the checkpoint)" in result.stderr


def test_a_run_over_documents_is_evaluated_by_document(evaluated: Evaluated, tmp_path: Path) -> None:
    at = MODEL.index("--lighthouse-budget")
    given = ["--attention", "lighthouse", FLAG, "--load", str(evaluated.checkpoint), "--out", str(tmp_path / "out")]
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 90)
    probe = ["--passkey-samples", "1", "--passkey-lengths", "131", "--passkey-depths", "0", "--passkey-fillers", "classic"]
    probe += ["--variables-samples", "1", "--variables-lengths", "255", "--variables-hops", "1", "--variables-fillers", "noise"]
    texts = ["--held-out", *(str(tmp_path / f"{name}.txt") for name in ("one", "two"))]
    result = evaluate(1, *given, *texts, *probe, model=[*MODEL[:at], *MODEL[at + 2 :]])
    assert result.returncode == 0, result.stdout[-3000:]
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (found["loss"]["position_in"], found["loss"]["sequences"]) == ("document", 2)
    assert 1 < found["loss"]["mean"] < 10
    assert found["passkey"]["fillers"]["classic"]["samples"] == 1
    assert found["variables"]["fillers"]["noise"]["samples"] == 1
