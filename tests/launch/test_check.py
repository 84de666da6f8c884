"""The memory that the check foretells: what is refused, what is only said, and what it keeps silent about."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.plan import memory
from megatron_lighthouse.plan.run import DEVICES, run_of
from tests.launch.scripts import LAUNCH, words

CLUSTERS = {"530m-98k": 8, "530m-256k-cp8": 8, "530m-1m": 32, "llama3-8b-512k": 64, "llama3-8b-1m": 128}
"""GPUs of a recipe, with which it must fit a B200."""

H100 = ("--arch", "hopper")
NOTES = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$@" >>"$NOTED"
exit 1
"""


def checked(recipe: str, gpus: int, more: str = "", *options: str, logits: str = "--loss-tile-tokens 0") -> int:
    """Unless said otherwise with all logits at once, which take much of the memory."""
    own = ["--nodes", str(gpus), "--gpus-per-node", "1", *options]
    return check.main([*own, "--", *words(recipe), "--mock-data", *logits.split(), *more.split()])


@pytest.mark.parametrize("recipe", CLUSTERS)
def test_a_recipe_fits_by_the_plan(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(recipe, CLUSTERS[recipe], "", "--arch", "blackwell", logits="") == 0
    found = memory.total(run_of(recipe, device=DEVICES["b200"])) / 2**30
    assert (
        f"; {found:.1f} of 171.0 GiB by the plan (HGX B200 180GB, vocabulary 128,256, which is assumed)\n"
        in capsys.readouterr().out
    )


def test_a_point_that_cannot_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    million = "--padded-vocab-size 128256 --attention dense --seq-length 1048576 --max-position-embeddings 1048576"
    million += " --context-parallel-size 1"
    assert checked("530m-98k", 32, "", "--arch", "blackwell", "--point", f"dense-1m {million}") == 1
    error = capsys.readouterr().err
    assert re.search(r"dense-1m: --seq-length 1048576 needs \d+\.\d GiB of a GPU .* 171\.0 are there \(HGX B200 180GB; ", error)
    found = re.search(r"use .*--context-parallel-size (\d+)\.", error)
    assert found
    more = million.replace("--context-parallel-size 1", f"--context-parallel-size {found[1]}")
    assert checked("530m-98k", 32, more, "--arch", "blackwell") == 0


def test_what_is_offered_fits(capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = "--padded-vocab-size 128256 "
    assert checked("530m-1m", 32, vocabulary, "--arch", "hopper") == 1
    offered = capsys.readouterr().err.partition(": use ")[2].rstrip(".\n").split(" or ")
    assert offered == [
        "no --loss-tile-tokens",
        "--context-parallel-size 16",
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ]
    assert checked("530m-1m", 32, vocabulary, "--arch", "hopper", logits="") == 0
    for more in offered[1:]:
        assert checked("530m-1m", 32, vocabulary + more, "--arch", "hopper") == 0
        assert "RUN OUT" not in capsys.readouterr().out


def test_what_takes_more_gpus_says_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    long = "--seq-length 8388608 --max-position-embeddings 8388608"
    assert checked("530m-1m", 8, long, "--arch", "blackwell", logits="") == 1
    error = capsys.readouterr().err
    assert "even with a vocabulary of 384, for the tokenizer's is not known here" in error
    assert re.search(r"--context-parallel-size 16 on 16 GPUs or --tensor-model-parallel-size 2 .* on 16 GPUs", error)


@pytest.mark.parametrize(
    ("more", "options", "says"),
    [
        ("--padded-vocab-size 32000 --seq-length 110592 --max-position-embeddings 110592", H100, "of 76.0 GiB .* MAY RUN OUT"),
        ("--padded-vocab-size 32000", H100, r"of 76.0 GiB by the plan \(H100 SXM 80GB, vocabulary 32,000\)\n"),
        ("", (*H100, "--device", "h200"), r"of 13[34]\.\d GiB by the plan \(H200"),
        ("", ("--arch", "blackwell", "--device", "h100"), "HGX B200"),  # the GPU of a login node
        ("", ("--arch", "blackwell", "--device", ""), "HGX B200"),
        ("--padded-vocab-size 384", H100, "57.3 of"),
    ],
)
def test_what_is_said(more: str, options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("530m-98k", 8, more, *options) == 0
    assert re.search(says, capsys.readouterr().out)


def test_no_run_is_refused_for_an_assumed_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("530m-98k", 8, "", *H100) == 0
    assert "vocabulary 128,256, which is assumed): IT MAY RUN OUT OF MEMORY" in capsys.readouterr().out
    assert checked("530m-98k", 8, "--padded-vocab-size 128256", *H100) == 1


@pytest.mark.parametrize("more", ["--num-experts 8", "--multi-latent-attention --attention dense", "--micro-batch-size 2"])
def test_silence_about_what_the_plan_does_not_know(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("530m-98k", 8, more, *H100) == 0
    assert "GiB" not in capsys.readouterr().out


def test_silence_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTHOUSE_ARCH", "hopper")  # of a job around this one
    for options in ((), ("--arch", "cpu", "--device", "h100")):
        assert checked("530m-98k", 8, "", *options) == 0
        assert "GiB" not in capsys.readouterr().out


def test_the_dense_stage_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that begins with dense attention or returns to it needs what that needs."""
    found = []
    for more in ("--attention dense", "--lighthouse-stage2-at 100", "--lighthouse-dense-warmup-iters 100", ""):
        assert checked("530m-98k", 8, more, "--arch", "blackwell") == 0
        found += [float(x) for x in re.findall(r"; ([\d.]+) of", capsys.readouterr().out)]
    assert found[0] == found[1] == found[2] > found[3]


@pytest.mark.parametrize("study", [(), ("--study", "CP=1 SEQ=98304 ATTENTION=dense")], ids=["run", "study"])
@pytest.mark.parametrize("script", ["submit.sh", "local.sh"])
def test_the_scripts_say_which_gpus(script: str, study: tuple[str, ...], tmp_path: Path) -> None:
    """By the cluster file, whatever the environment says, and by name where this machine has one."""
    programs = {"python": NOTES, "nvidia-smi": '#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: NVIDIA H200" || echo "NVIDIA H200"\n'}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": f"{tmp_path}/python", "NOTED": f"{tmp_path}/noted"}
    command = [str(LAUNCH / script), "--cluster", "hgx-h100", "--recipe", "530m-98k", "--run", f"{tmp_path}/run", *study]
    gpus = ["--gpus", "1"] if script == "local.sh" else []
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([*command, *gpus, "--", "--mock-data"], env={**environment, **own, "LIGHTHOUSE_ARCH": "cpu"})
    assert done.returncode != 0
    assert re.search(r"launch\.check (--point .* )?--arch hopper --device h200 --nodes", (tmp_path / "noted").read_text())


def pieces(*lengths: int) -> bytes:
    """A model of SentencePiece's, of as many pieces, and another field behind them."""
    return (
        b"".join(b"\n" + (bytes([n]) if n < 128 else bytes([n % 128 | 128, n // 128])) + b"\n" * n for n in lengths)
        + b"\x12\x01\n"
    )


NUMBERED = {"vocab": {"a": 0, "b": 1}}
ASSUMED = "128,256, which is assumed)"


@pytest.mark.parametrize(
    ("kind", "file", "content", "says"),
    [
        ("HuggingFaceTokenizer", "tokenizer.json", {"model": NUMBERED, "added_tokens": [{"id": 1}, {"id": 2}]}, "3)"),
        ("HuggingFaceTokenizer", "tokenizer.json", {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}, "2)"),
        ("HuggingFaceTokenizer", "tokenizer.json", {"model": None}, ASSUMED),
        ("Llama2Tokenizer", "tokenizer.model", pieces(3, 200, 5), "3)"),
        ("GPT2BPETokenizer", "vocab.json", {}, ASSUMED),
        ("TikTokenizer", "ranks.json", {}, "500)"),
        ("NullTokenizer", "", {}, "500)"),
    ],
)
def test_the_vocabulary_is_the_one_that_megatron_takes(
    kind: str, file: str, content: dict[str, object] | bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer's own, whatever --vocab-size says, but for those that are made of it."""
    (tmp_path / (file or "none")).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    model = tmp_path if kind == "HuggingFaceTokenizer" else tmp_path / file
    own = ["--nodes", "8", "--gpus-per-node", "1", "--without-megatron", *H100, "--", *words("530m-98k"), "--mock-data"]
    tokenizer = ["--vocab-size", "500", "--tokenizer-type", kind, "--tokenizer-model", str(model)]
    assert check.main([*own, *tokenizer]) == 0
    said = capsys.readouterr().out
    assert f"vocabulary {says}" in said
    assert ("--vocab-size is not read with such a --tokenizer-type" in said) == (says != "500)")
    assert check.main([*own, *tokenizer, "--padded-vocab-size", "640"]) == 0
    assert "vocabulary 640)" in capsys.readouterr().out
    assert check.main([*own, *tokenizer, "--no-pad-vocab-size"]) == 0  # then the model has what the words say
    assert "vocabulary 500)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    ["--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 5", "--dataloader-inter-document-masking"],
)
def test_memory_that_is_not_counted_is_said(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("530m-98k", 8, more, *H100) == 0
    assert "; memory is not looked at: " in capsys.readouterr().out


def test_the_telemetry_of_parallax_needs_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("530m-98k", 8, "--attention parallax --parallax-telemetry-interval 5") == 1
    assert "--parallax-telemetry-interval 5 has nowhere to log to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "more", "note"),
    [
        (1, "--graphs auto --seq-length 32768 --max-position-embeddings 32768", "--cuda-graph-impl full_iteration is taken."),
        (
            2,
            "--graphs auto --seq-length 32768 --max-position-embeddings 32768",
            "CUDA graphs are left off: they are not tried with evaluations over 2 ranks.",
        ),
        (2, "--graphs auto", "CUDA graphs are left off: at 98,304 tokens a rank"),
        (2, "", None),
        (2, "--graphs auto --skip-train", None),
    ],
)
def test_what_is_made_of_graphs_is_said(gpus: int, more: str, note: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("530m-98k", gpus, more, "--arch", "hopper", "--device", "h200", "--without-megatron") == 0
    out = capsys.readouterr().out
    assert (f"note: --graphs auto: {note}" in out) if note else ("--graphs auto:" not in out)


def test_graphs_are_not_spoken_of_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("530m-98k", 1, "--graphs auto", "--without-megatron") == 0
    assert "--graphs auto:" not in capsys.readouterr().out
