"""A run's own arguments given to an evaluation: what of them is taken, what is refused, and what becomes of --out."""

from __future__ import annotations

import argparse
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_lighthouse.mcore.command_line import settings
from megatron_lighthouse.recipe import evaluation_files, evaluation_plots, passkey, probes
from megatron_lighthouse.recipe.probe import FILLERS, Grid, bytes_of
from megatron_lighthouse.recipe.same_model import check_same_model
from tests.mcore.harness import MODEL, ROOT, run
from tests.mcore.test_evaluate import TOKENS, evaluate, tiny

RUN = ["--attention", "lighthouse", "--lighthouse-stage2-at", "2", "--global-batch-size", "1"]
"""Of MODEL's three iterations, the last is dense."""
WARMUP_OF = "--lighthouse-dense-warmup-iters 2"
WARMUP = WARMUP_OF.split()
LAYERS = ["--lighthouse-return", "layers", "--lighthouse-return-iters", "4"]
NOTHING = ["--loss-sequences", "0", "--passkey-samples", "0"]
BUILT = "number of parameters on"
"""Megatron's word of a model."""


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run of RUN, after iterations 2 and 3; beside them held-out text."""
    folder = tmp_path_factory.mktemp("switched")
    run(folder / "run", *RUN, "--save", str(folder / "checkpoints"), "--save-interval", "3")
    (folder / "held-out.txt").write_bytes((ROOT / "README.md").read_bytes()[:1100])
    return folder


def of(folder: Path, out: Path, *more: str) -> list[str]:
    """The run's arguments, and an evaluation's."""
    checkpoints, text = str(folder / "checkpoints"), str(folder / "held-out.txt")
    own = [*RUN, "--save", checkpoints, "--save-interval", "3"]
    return [*own, "--load", checkpoints, "--held-out", text, "--out", str(out), *more]


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluation.json").read_text())


def test_after_the_switch_it_is_dense_on_more_ranks_than_the_run_and_its_logs_and_other_files_stay(
    switched: Path, tmp_path: Path
) -> None:
    tensorboard, out = tmp_path / "tensorboard", tmp_path / "out"
    out.mkdir()
    for name in ("hindsight.csv", "passkey.png.partial", "notes.txt"):
        (out / name).write_text("of another checkpoint")
    logs = ["--tensorboard-dir", str(tensorboard), "--wandb-project", "name", "--wandb-exp-name", "name"]
    asked = ["--loss-sequences", "2", "--passkey-samples", "0"]
    result = evaluate(2, *of(switched, out, *logs, *asked))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = summary_of(out)
    assert [summary[name] for name in ("iteration", "attention", "lighthouse_layers")] == [3, "dense", 0]
    assert summary["loss"]["sequences"] == 2
    assert not tensorboard.exists()
    written = {"evaluation.json", "loss.csv", "loss_by_sequence.csv", "loss.png"}
    assert {path.name for path in out.iterdir()} == {*written, "notes.txt"}


def test_up_to_the_switch_it_is_lighthouse(switched: Path, tmp_path: Path) -> None:
    by_samples = ["--train-samples", "3"]  # in batches of two, one iteration: too few for stage 2
    model = " ".join(MODEL).replace(" --train-iters 3 ", " ").split()
    watched = ["--lighthouse-telemetry-interval", "1", "--lighthouse-telemetry-layers", "2"]  # in logs, which are left alone
    asked = [*NOTHING, "--hindsight-samples", "2", "--ckpt-step", "2"]
    result = evaluate(2, *of(switched, tmp_path, *by_samples, *watched, *asked), model=model)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = summary_of(tmp_path)
    assert [summary[name] for name in ("iteration", "attention", "lighthouse_layers")] == [2, "lighthouse", 2]
    assert summary["hindsight"]["samples"] == 2


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        (
            [*NOTHING, "--hindsight-samples", "2"],
            ["in iteration 3 of --load", "all are dense (--lighthouse-stage2-at 2): give --ckpt-step 2, or --hindsight"],
        ),
        (
            ["--rotary-base", "500000", "--num-layers", "3", "--ffn-hidden-size", "64"],
            ["--num-layers 3, there 4", "--ffn-hidden-size 64, there 128", "--rotary-base 500000, there 10000"],
        ),
        (
            ["--context-parallel-size", "2"],
            ["--context-parallel-size 2: an evaluation splits neither", "Use --context-parallel-size 1"],
        ),
        (
            ["--context-parallel-size", "4", *"--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2".split()],
            ["--context-parallel-size 4: an evaluation splits neither"],
        ),
        (
            ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"],
            ["--pipeline-model-parallel-size 2: an evaluation splits neither"],
        ),
        (["--out", "FILE"], ["--out", "must be a folder that can be written to, or not exist yet"]),
        (
            "--context-parallel-size 2 --pipeline-model-parallel-size 2 --rotary-base 500000 --held-out nowhere --out FILE "
            "--loss-sequences -1 --loss-grid equal --loss-buckets 0 --passkey-depths 2 --passkey-lengths 999 "
            "--hindsight-samples -1 --hindsight-seed -2".split(),
            [
                *("--context-parallel-size 2: an", "--pipeline-model-parallel-size 2: an", "--rotary-base 500000, there 10000"),
                *("nowhere", "must be a folder that can be", "--loss-sequences -1 must be", "--loss-buckets 0 must be"),
                *("--passkey-depths 2 must be", "--passkey-lengths 999 must be", "--hindsight-samples -1 must be"),
                *("--hindsight-seed -2 must be", "all are dense (--lighthouse-stage2-at 2)"),
            ],
        ),
        (
            ["--load", "nowhere", "--loss-buckets", "0", "--loss-grid", "equal"],
            ["holds no checkpoint", "--loss-buckets 0 must"],
        ),
        (
            ["--loss-buckets", "some", "--passkey-samples", "2e1", "--held-outs", "x"],
            ["--loss-buckets some must be", "--passkey-samples 2e1 must be", "did you mean --held-out?"],
        ),
    ],
    ids=["hindsight", "model", "context parallel", "its groups", "pipeline", "out", "all at once", "no checkpoint", "words"],
)
def test_refused_before_the_model_is_built(switched: Path, tmp_path: Path, more: list[str], messages: list[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    more = [str(file) if word == "FILE" else word for word in more]
    result = evaluate(1, *of(switched, tmp_path / "out", *more))
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    for message in messages:
        assert message in result.stderr
    assert BUILT not in result.stdout
    assert not (tmp_path / "out").exists()


def lighthouse(*words: str, **more: Any) -> Namespace:
    """Parsed arguments of Lighthouse, and what else is read of Megatron's: six layers, four of them Lighthouse."""
    parser = settings.add_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--lighthouse-dense-first", "1", "--lighthouse-dense-last", "1", *words])
    return Namespace(**vars(args), **{"num_layers": 6, "spec": None, **more})


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    ("words", "iteration", "expected"),
    [
        ([], 9, ("dense", 0, None)),
        (["--lighthouse-stage2-at", "6"], 9, ("dense", 0, None)),  # of a run's arguments; --attention dense
        (["--attention", "lighthouse"], 9, ("lighthouse", 4, None)),
        (["--attention", "lighthouse", "--lighthouse-stage2-at", "6"], 6, ("lighthouse", 4, None)),
        (["--attention", "lighthouse", "--lighthouse-stage2-at", "6"], 7, ("dense", 0, "--lighthouse-stage2-at 6")),
        (["--attention", "lighthouse", *WARMUP], 0, ("dense", 0, WARMUP_OF)),
        (["--attention", "lighthouse", *WARMUP], 2, ("dense", 0, WARMUP_OF)),
        (["--attention", "lighthouse", *WARMUP], 3, ("lighthouse", 4, None)),
        (["--attention", "lighthouse", *WARMUP, "--lighthouse-stage2-at", "6"], 2, ("dense", 0, WARMUP_OF)),
        (["--attention", "lighthouse", *WARMUP, "--lighthouse-stage2-at", "6"], 7, ("dense", 0, "--lighthouse-stage2-at 6")),
        (["--attention", "lighthouse", "--lighthouse-stage2-at", "6", *LAYERS], 7, ("lighthouse", 3, None)),
        (["--attention", "lighthouse", "--lighthouse-stage2-at", "6", *LAYERS], 10, ("dense", 0, "--lighthouse-stage2-at 6")),
    ],
)
def test_attention_is_that_of_the_iteration(words: list[str], iteration: int, expected: tuple[Any, ...]) -> None:
    from megatron_lighthouse.recipe.which_attention import BY_SPEC, settle_attention

    given = [lighthouse(*words)]
    if words[:1] == ["--attention"]:
        given.append(lighthouse(*words[2:], spec=BY_SPEC))
    for args in given:
        settle_attention(args, iteration)
        assert (args.attention, args.lighthouse_layers, args.dense_by) == expected
        assert args.spec is None
        assert args.attention == "lighthouse" or args.lighthouse_stage2_at is args.lighthouse_dense_warmup_iters is None


def test_what_the_layers_did_in_training_is_asked_of_the_checkpoint(switched: Path) -> None:
    """Here the command line names no switch."""
    from megatron_lighthouse.recipe.which_attention import selecting, trained_with

    args = lighthouse("--attention", "lighthouse", load=str(switched / "checkpoints"))
    assert [trained_with(args, iteration) for iteration in (2, 3, 4)] == ["lighthouse", "dense", None]
    assert selecting(args) == [2]


def test_default_lengths_that_do_not_fit_are_left_out_and_others_refused() -> None:
    from megatron_lighthouse.recipe.probes import grid_of

    sizes = ["--lighthouse-levels", "3", "--lighthouse-pooling", "4", "--lighthouse-budget", "32"]
    asked = {"passkey_depths": [0.5], "passkey_samples": 10, "passkey_fillers": FILLERS, "passkey_seed": 1}
    asked |= {"seq_length": 1024, "sequence_parallel": False}

    def grid(*words: str, lengths: list[int] | None = None) -> tuple[Any, list[str]]:
        return grid_of(passkey.PROBE, lighthouse(*words, *sizes, **asked, passkey_lengths=lengths), len(TOKENS) * 2)

    found, said = grid("--attention", "lighthouse", "--lighthouse-tile-budget", "8")
    assert found.lengths == [512, 1024]  # at least 32 · 16
    assert len(said) == 1
    assert said[0].startswith("no passkey in 128, 256 tokens: with --attention lighthouse: ")
    with pytest.raises(ValueError, match="--passkey-lengths 256 with --attention lighthouse: "):
        grid("--attention", "lighthouse", "--lighthouse-tile-budget", "8", lengths=[256, 1024])
    found, said = grid()
    assert (found.lengths, said) == ([128, 256, 512, 1024], [])


@pytest.mark.usefixtures("megatron")
def test_only_what_shapes_the_model_is_compared() -> None:
    shape = {"load": "ckpt", "num_layers": 4, "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope"}
    given = Namespace(
        **shape, bf16=True, tensor_model_parallel_size=2, seq_length=512, max_position_embeddings=512, use_mup=False
    )
    layout = {"bf16": False, "tensor_model_parallel_size": 1, "seq_length": 256, "max_position_embeddings": 256}
    check_same_model(given, None)
    check_same_model(given, Namespace(**shape, **layout))
    other = {**shape, "num_layers": 6, "swiglu": False, "add_bias_linear": True}
    with pytest.raises(ValueError, match="--load ckpt holds another model") as refused:
        check_same_model(given, Namespace(**other, **layout))
    differences = ["--num-layers 4, there 6", "--disable-bias-linear given, there not given", "--swiglu given, there not given"]
    assert str(refused.value).split("\n  - ")[1:] == differences
    heads = {**shape, "num_attention_heads": 4, "group_query_attention": False}
    check_same_model(Namespace(**heads, num_query_groups=1), Namespace(**heads, num_query_groups=4))
    with pytest.raises(ValueError, match="--num-query-groups 4, there 2"):
        check_same_model(
            Namespace(**heads, num_query_groups=1), Namespace(**{**heads, "group_query_attention": True}, num_query_groups=2)
        )
    given.position_embedding_type = "learned_absolute"
    with pytest.raises(ValueError, match="--max-position-embeddings 512, there 256"):
        check_same_model(given, Namespace(**{**shape, **layout, "position_embedding_type": "learned_absolute"}))


@pytest.mark.usefixtures("megatron")
def test_a_measurement_is_written_before_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.recipe import evaluate as command
    from megatron_lighthouse.recipe.trained import Trained

    class Cut(Exception):
        """The end of the job."""

    def cut(*_: Any) -> None:
        raise Cut

    args = Namespace(out=tmp_path, load="ckpt", attention="dense", lighthouse_layers=0, seq_length=128, hindsight_samples=1)
    for name, value in {"loss_sequences": 2, "loss_grid": "log2", "loss_buckets": 16}.items():
        setattr(args, name, value)
    grid = Grid(passkey.PROBE, passkey.PROBE.words(bytes_of), [128], [0.5], 1)
    expected = {"loss.csv", "loss_by_sequence.csv", "loss.png"}
    for module, following in ((probes, "answers"), (command, "hindsight_by_distance")):
        with monkeypatch.context() as patch:
            patch.setattr(module, following, cut)
            with pytest.raises(Cut):
                command.measure(Trained(args, 3, tiny(fused=True)), TOKENS, [grid])
        assert {path.name for path in tmp_path.iterdir()} == expected
        expected |= {"passkey.csv", "passkey_by_question.csv", "passkey.png"}


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(rows: Any, path: Path, *_: str) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(evaluation_plots, "hindsight", half)
    with pytest.raises(OSError, match="disk full"):
        evaluation_files.hindsight(tmp_path, {"unit": "byte", "distances": [{"distance": 0}]}, "")
    assert [path.name for path in tmp_path.iterdir()] == ["hindsight.csv"]


def test_a_start_removes_what_an_evaluation_writes_and_nothing_else(tmp_path: Path) -> None:
    found = numpy.random.default_rng(1).random(3).tolist()
    rows = [{"distance": n, "difference": x, "standard_error": x} for n, x in enumerate(found)]
    hindsight = {"unit": "byte", "distances": rows, "difference": 1.0, "standard_error": 1.0, "samples": 3}
    (tmp_path / "mine.csv").touch()
    kept = evaluation_files.hindsight(tmp_path, hindsight, "")
    assert "distances" not in kept
    evaluation_files.summary(tmp_path, {"hindsight": kept, "loss": float("nan")})
    assert summary_of(tmp_path)["loss"] is None
    assert len(os.listdir(tmp_path)) == 4
    evaluation_files.start(tmp_path)
    assert os.listdir(tmp_path) == ["mine.csv"]
