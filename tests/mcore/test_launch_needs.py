"""The check before queuing: what this machine lacks, and that one fault hides no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_lighthouse.launch import check, preflight
from megatron_lighthouse.mcore.command_line import run_options
from tests.launch.scripts import words as launch_words
from tests.mcore.harness import MODEL, TEXT, Processes, without
from tests.mcore.test_launch_check import GPUS, LLAMA


def test_all_problems_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """However malformed some values are: rules that these have no part in are asked all the same."""
    nine = """--rotary-base 500k --lr abc --lighthouse-bugdet 2048 --context-parallel-size 3 --attention-dropout 0.1
    --lighthouse-budget 2k --save-interval 0 --kv-channels 0 --fp8-format hybrid=x --train-iters 1e3"""
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *nine.split()]) == 1
    error = capsys.readouterr().err
    for says in (
        "--rotary-base 500k must be a whole number, in digits alone: write 500000.",
        "--lr abc must be a number: give one.",
        "did you mean --lighthouse-budget?",
        "--context-parallel-size 3 x",
        "--attention-dropout 0.1",
        "--lighthouse-budget 2k must be a whole number, in digits alone: write 2048.",
        "--save-interval 0",
        "--kv-channels 0 must be at least 1",
        "--fp8-format: invalid choice",
        "--train-iters 1e3 must be a whole number, in digits alone: write 1000.",
    ):
        assert error.count(says) == 1, (says, error)
    assert error.count("--lr ") == 1, error  # with its default, none, the rate would be missing
    assert error.count("\n  - ") == 10, error


def test_kernels_packages_are_asked_for_where_gpus_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Which a layer would miss once it is built."""
    local = "--transformer-impl local --no-rope-fusion --no-persist-layer-norm --tokenizer-type NullTokenizer --vocab-size 9"
    ours = [*LLAMA, *local.split(), *"--context-parallel-size 1 --tensor-model-parallel-size 1 --global-batch-size 64".split()]
    for more, package in (("--lighthouse-scorer gla", "fla.ops.simple_gla"), ("--lighthouse-inner fa4", "flash_attn.cute")):
        quick = ["--runs-here", "--without-megatron", "--", *ours, *more.split()]
        assert check.main([*GPUS, *quick]) == 1
        error = capsys.readouterr().err
        assert re.search(rf"{more}.* needs the package {package}, .*: install it \(pip install", error), error
        assert package in preflight.needs([*ours, *more.split()], "hopper")
    cpu = ["--arch", "cpu", *GPUS[2:], "--runs-here", "--without-megatron", "--", *ours, "--lighthouse-scorer", "gla"]
    assert check.main([*cpu, "--distributed-backend", "gloo"]) == 0, capsys.readouterr().err  # by the reference


def test_ranks_without_gpus_cannot_meet_by_nccl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = "--distributed-backend nccl (Megatron's default) is for GPUs, and the ranks have none: add --distributed-backend"
    own = ["--nodes", "2", "--gpus-per-node", "1", "--runs-here", "--without-megatron", "--", *launch_words("cpu-test")[:-4]]
    assert check.main([*own, "--mock-data"]) == 0, capsys.readouterr().err
    assert check.main([*own, "--mock-data", "--distributed-backend", "nccl"]) == 1
    assert says in capsys.readouterr().err
    if not torch.cuda.is_available():
        run = Processes(tmp_path, 1, [*MODEL, *TEXT, "--distributed-backend", "nccl"])
        assert (run.wait(), says in run.log.read_text()) == ([2], True)


def test_a_softmax_that_apex_would_bring(capsys: pytest.CaptureFixture[str]) -> None:
    words = without(launch_words("cpu-test")[:-4], "--no-masked-softmax-fusion")
    words += ["--mock-data", "--context-parallel-size", "1"]
    own = ["--nodes", "1", "--gpus-per-node", "1", "--runs-here", "--without-megatron", "--"]
    assert check.main([*own, *words]) == 0, capsys.readouterr().err  # in 32 bits none is fused
    assert check.main([*own, *words, "--bf16"]) == 1
    assert "needs scaled_masked_softmax_cuda of NVIDIA Apex, which is not installed: add --no-masked" in capsys.readouterr().err
    for taken in (
        "--num-attention-heads 2",
        "--lighthouse-dense-first 0 --lighthouse-dense-last 0",
    ):  # where Megatron fuses none
        assert check.main([*own, *words, "--bf16", *taken.split()]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("more", ["--text-data", "--rampup-batch-size=8", "--moe-layer-freq ([0]+[1]*15"])
def test_words_that_cannot_be_read_hide_nothing_else(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *more.split(), "--lighthouse-bugdet", "2"]) == 1
    error = capsys.readouterr().err
    flag = more.partition("=")[0].split()[0]
    assert re.search(rf"  - .*{flag}", error), error
    assert "did you mean --lighthouse-budget?" in error or flag == "--rampup-batch-size"  # argparse ends with that alone


def test_a_batch_that_may_shrink_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "2", "--gpus-per-node", "1", "--without-megatron", "--", *launch_words("cpu-test"), "--mock-data"]
    words += "--context-parallel-size 1 --global-batch-size 3".split()
    assert check.main(words) == 1
    assert "--global-batch-size 3 must be a multiple of 2" in capsys.readouterr().err
    assert check.main([*words, "--decrease-batch-size-if-needed"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--seq-length 131071", ["--seq-length 131071 must be a multiple of 256 ", "use --seq-length 130816 or 131072."]),
        ("--seq-length 131071 --attention dense", ["--seq-length 131071 must be a multiple of 8", "use 131064 or 131072."]),
        (
            "--context-parallel-size 3 --seq-length 131070 --attention-dropout 0.1",
            ["8 nodes x 8 = 64: use --context-parallel-size 2 or 4", "--attention-dropout 0.1"],
        ),
    ],
)
def test_remedies_do_not_contradict(more: str, says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a length, the one that all rules take; of ranks, what works, whatever else is wrong."""
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *more.split()]) == 1
    error = capsys.readouterr().err
    for text in says:
        assert text in error, error
    assert error.count("\n  - --seq-length") <= 1, error
    assert "smaller sizes" not in error


def test_packages_that_the_run_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused where the job's Python is this one; another's are not looked at here."""
    monkeypatch.setattr(run_options, "find_spec", lambda name: None)
    assert check.main([*GPUS, "--", *LLAMA]) == 0
    capsys.readouterr()
    assert check.main([*GPUS, "--runs-here", "--", *LLAMA, "--gradient-accumulation-fusion"][:-1]) == 1
    error = capsys.readouterr().err
    assert "needs the package transformers, which is not installed: install it (pip install transformers)" in error
    assert "needs the package transformer_engine" in error
    assert "or use --transformer-impl local --no-rope-fusion." in error
    for option, package in (("--optimizer muon", "emerging_optimizers"), ("--wandb-project x", "wandb")):
        assert check.main([*GPUS, "--runs-here", "--", *LLAMA, *option.split()]) == 1
        assert f"{option} needs the package {package}, which is not installed" in capsys.readouterr().err
    assert error.count("name it by IMAGE in the cluster file; another Python by PYTHON. With CHECK_PYTHON the job's") == 1
    assert check.main([*GPUS, "--runs-here", "now", "--", *LLAMA]) == 1  # which takes no container
    assert "Name another Python that has these packages by PYTHON." in (here := capsys.readouterr().err)
    assert "IMAGE" not in here
    by_name = ["--tokenizer-type", "GPT2BPETokenizer"]
    assert check.main([*GPUS, "--runs-here", "--", *LLAMA, *by_name, "--vocab-file", __file__]) == 1
    assert "GPT2BPETokenizer without --merge-file, which it downloads (or give these), needs the package wget" in (
        capsys.readouterr().err
    )
    assert check.main([*GPUS, "--runs-here", "--", *LLAMA, *by_name, "--vocab-file", __file__, "--merge-file", __file__]) == 1
    assert "wget" not in capsys.readouterr().err
    for kind, package in (("TikTokenizer", "tiktoken"), ("GPTSentencePieceTokenizer", "sentencepiece")):
        assert check.main([*GPUS, "--runs-here", "--", *LLAMA, "--tokenizer-type", kind, "--tokenizer-model", __file__]) == 1
        assert f"needs the package {package}" in capsys.readouterr().err
