"""A wrong line is refused before queuing, and each remedy that the refusal names is enough: no second error follows.

What Megatron itself says of it then, is asked too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.launch import megatron as asked_megatron
from tests.mcore.harness import MODEL, TEXT, Processes, without
from tests.mcore.test_launch_check import GPUS, LLAMA
from tests.mcore.test_together import MAJOR

NODES = ["--arch", "blackwell", "--nodes", "1", "--gpus-per-node", "8"]
"""One node, of which LLAMA's TP 2 x CP 4 take all GPUs."""
LLAMA3 = "!--use-rope-scaling !--rope-scaling-factor"
RECOMPUTE = "!--recompute-method !--recompute-num-layers"

ROUNDS = {
    "a factor without its switch": (
        "!--use-rope-scaling",
        "--rope-scaling-factor 8.0 means nothing without --use-rope-scaling: leave it out, or add that.",
        [LLAMA3, ""],
    ),
    "a factor of YaRN's": (
        "--rotary-scaling-factor 4",
        "leave it out, or use --position-embedding-type yarn in place of --use-rope-scaling and --rope-scaling-factor 8.0, or "
        "--rope-scaling-factor 4, Llama 3's, in its place.",
        ["", f"{LLAMA3} --position-embedding-type yarn --rotary-scaling-factor 4", "--rope-scaling-factor 4"],
    ),
    "the same without Llama's": (
        f"{LLAMA3} --rotary-scaling-factor 4",
        "use --position-embedding-type yarn, or --use-rope-scaling --rope-scaling-factor 4, Llama 3's, in its place.",
        [
            f"{LLAMA3} --position-embedding-type yarn --rotary-scaling-factor 4",
            f"{LLAMA3} --use-rope-scaling --rope-scaling-factor 4",
        ],
    ),
    "YaRN": (
        "--position-embedding-type yarn",
        "--use-rope-scaling and --rope-scaling-factor 8.0 are not read with --position-embedding-type yarn: leave them out.",
        [f"{LLAMA3} --position-embedding-type yarn"],
    ),
    "a warm-up in samples": (
        "--lr-warmup-samples 1600",
        "--lr-warmup-samples 1600 is not read beside --train-iters 20000: leave it out.",
        [""],
    ),
    "the same without a fraction": (
        "!--lr-warmup-fraction --lr-warmup-samples 1600",
        "use --lr-warmup-iters 100 in its place.",
        ["!--lr-warmup-fraction --lr-warmup-iters 100"],
    ),
    "a decay in samples": ("--lr-decay-samples 160000", "use --lr-decay-iters 10000", ["--lr-decay-iters 10000"]),
    "a fall in samples": (
        "--lr-decay-style WSD --lr-wsd-decay-samples 16000",
        "use --lr-wsd-decay-iters 1000 in its place.",
        ["--lr-decay-style WSD --lr-wsd-decay-iters 1000"],
    ),
    "a warm-up longer than the decay": (
        "--lr-decay-iters 100 --lr-warmup-iters 200",
        "use --lr-warmup-fraction 0.02 alone",
        ["--lr-decay-iters 100 --lr-warmup-fraction 0.02"],
    ),
    "a weight decay that falls": (
        "--weight-decay-incr-style linear --start-weight-decay 0.3 --end-weight-decay 0.2",
        "use --start-weight-decay 0.2 --end-weight-decay 0.3",
        ["--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.3"],
    ),
    "halves of a width": (
        "--ffn-hidden-size 14338",
        "must be a multiple of 4 (2 tensor-parallel ranks, each with halves for --swiglu): use 14336 or 14340.",
        ["--ffn-hidden-size 14336", "--ffn-hidden-size 14340"],
    ),
    "widths of experts": (
        "--num-experts 8 --moe-ffn-hidden-size 1023 --moe-shared-expert-intermediate-size 513",
        "--moe-ffn-hidden-size 1023 must be a multiple of 2",
        ["--num-experts 8 --moe-ffn-hidden-size 1022 --moe-shared-expert-intermediate-size 514"],
    ),
    "experts as wide as the MLP": (
        "--num-experts 8 --expert-tensor-parallel-size 8 --ffn-hidden-size 1028",
        "--ffn-hidden-size 1028 must be a multiple of 8 (8 tensor-parallel ranks of experts): use 1024 or 1032.",
        ["--num-experts 8 --expert-tensor-parallel-size 8 --ffn-hidden-size 1032"],
    ),
    "dense layers between such experts": (
        "--num-experts 8 --expert-tensor-parallel-size 8 --ffn-hidden-size 1028 --moe-layer-freq 2",
        "must be a multiple of 8 (2 tensor-parallel ranks, each with halves for --swiglu and 8 tensor-parallel ranks of",
        ["--num-experts 8 --expert-tensor-parallel-size 8 --ffn-hidden-size 1024 --moe-layer-freq 2"],
    ),
    "a width that is no layer's": (
        "--num-experts 8 --moe-ffn-hidden-size 1024 --ffn-hidden-size 1023",
        "--ffn-hidden-size 1023 must be a multiple of 4 (2 tensor-parallel ranks, each with halves for --swiglu)",
        [
            "--num-experts 8 --moe-ffn-hidden-size 1024 --ffn-hidden-size 1025",
            "--num-experts 8 --expert-tensor-parallel-size 1 --ffn-hidden-size 1023 !--swiglu",
        ],
    ),
    "tokens of tensor-parallel ranks": (
        "--attention dense --context-parallel-size 1 --global-batch-size 32 --seq-length 131071",
        "--seq-length 131071 must be a multiple of 2 with --sequence-parallel",
        ["--attention dense --context-parallel-size 1 --global-batch-size 32 --seq-length 131070"],
    ),
    "a method of recomputation": (
        "--recompute-granularity selective",
        "--recompute-method uniform --recompute-num-layers 1 are of --recompute-granularity full: leave them out",
        [f"{RECOMPUTE} --recompute-granularity selective", "--recompute-granularity full"],
    ),
    "modules": (
        f"{RECOMPUTE} --recompute-granularity selective --recompute-modules mlp attn",
        "--recompute-modules attn is not known: use some of core_attn,",
        [f"{RECOMPUTE} --recompute-granularity selective --recompute-modules mlp core_attn"],
    ),
    "graphs beside recomputation": (
        "--cuda-graph-impl local",
        "use --cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad, --recompute-granularity selective without "
        "--recompute-method and --recompute-num-layers",
        [
            "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad",
            f"{RECOMPUTE} --recompute-granularity selective --cuda-graph-impl local",
        ],
    ),
    "a second activation": ("--quick-geglu", "--swiglu and --quick-geglu exclude each other", ["!--swiglu --quick-geglu"]),
    "parameters of eight bits": (
        "--fp8-param-gather",
        "--fp8-param-gather is of --fp8-format: add that",
        ["--fp8-param-gather --fp8-format hybrid"],
    ),
    "batches in steps": (
        "--rampup-batch-size 8 8 1000",
        "use --step-batch-size-schedule in place of --global-batch-size",
        ["!--global-batch-size --step-batch-size-schedule 0:8"],
    ),
    "the same beside a batch": (
        "--step-batch-size-schedule 0:8",
        "--step-batch-size-schedule and --global-batch-size exclude each other: leave one of them out",
        ["!--global-batch-size --step-batch-size-schedule 0:8"],
    ),
    "a batch of evaluation": (
        "--eval-micro-batch-size 3",
        "must be a multiple of 3 (--eval-micro-batch-size 3 x 1 data-parallel ranks): use --eval-global-batch-size 15 or 18",
        ["--eval-micro-batch-size 3 --eval-global-batch-size 18"],
    ),
    "offloading": (
        "!--use-distributed-optimizer !--overlap-param-gather --optimizer-cpu-offload",
        "needs --use-precision-aware-optimizer and --use-distributed-optimizer: add them",
        ["--optimizer-cpu-offload --use-precision-aware-optimizer"],
    ),
    "instances of the optimizer": ("--num-distributed-optimizer-instances 3", "must divide the 4 data- and", [""]),
    "saves between saves": (
        "--non-persistent-save-interval 100",
        "add --non-persistent-ckpt-type global, or leave it out",
        ["--non-persistent-save-interval 100 --non-persistent-ckpt-type global"],
    ),
    "an initialization": ("--init-method-xavier-uniform", "fails in Megatron 0.19", [""]),
    "layers of eight bits": (
        "--fp8-format hybrid --transformer-impl local",
        "leave it out, or use --transformer-impl transformer_engine",
        ["--fp8-format hybrid"],
    ),
    "experts over tensor-parallel ranks": (
        "!--sequence-parallel --num-experts 8",
        "--num-experts 8 with --tensor-model-parallel-size 2 needs --sequence-parallel: add it.",
        ["--num-experts 8"],
    ),
    "a mask of documents": (
        "--reset-attention-mask",
        "use --dataloader-inter-document-masking and --transformer-impl local without --lighthouse-budget",
        ["!--lighthouse-budget --dataloader-inter-document-masking --transformer-impl local"],
    ),
    "a loader": ("--dataloader-type external", "use single or cyclic", ["--dataloader-type single"]),
    "a share of channels": ("--kv-channels 64 --rotary-percent 0.02", "use --rotary-percent 1.", ["--kv-channels 64"]),
    "a flag that was": ("--batch-size 8", "use --micro-batch-size in its place", ["--micro-batch-size 1"]),
    "context-parallel ranks": (
        "--context-parallel-size 3",
        "= 6 must divide the GPUs of the job, 1 node x 8 = 8: use --context-parallel-size 2 or 4.",
        ["--context-parallel-size 2", "--context-parallel-size 4"],
    ),
    "tensor-parallel ranks": (
        "--tensor-model-parallel-size 16",
        "= 64 must divide the GPUs of the job, 1 node x 8 = 8: use --tensor-model-parallel-size 2.",
        ["--tensor-model-parallel-size 2"],
    ),
    "stages of other sizes": (
        "--pipeline-model-parallel-size 2 --context-parallel-size 2 --decoder-first-pipeline-num-layers 10 "
        "--decoder-last-pipeline-num-layers 20",
        "2 of --num-layers 32 are left to the 0 other stages of --pipeline-model-parallel-size 2, which must have equally "
        "many: use --decoder-first-pipeline-num-layers 12.",
        [
            "--pipeline-model-parallel-size 2 --context-parallel-size 2 --decoder-first-pipeline-num-layers 12 "
            "--decoder-last-pipeline-num-layers 20"
        ],
    ),
    "a first stage of another size": (
        "--pipeline-model-parallel-size 4 --context-parallel-size 1 --decoder-first-pipeline-num-layers 4",
        "28 of --num-layers 32 are left to the 3 other stages of --pipeline-model-parallel-size 4, which must have equally "
        "many: use --decoder-first-pipeline-num-layers 2 or 5.",
        [
            f"--pipeline-model-parallel-size 4 --context-parallel-size 1 --decoder-first-pipeline-num-layers {layers}"
            for layers in (2, 5)
        ],
    ),
    "stages": (
        "--pipeline-model-parallel-size 2",
        "use --context-parallel-size 2, or --pipeline-model-parallel-size 1, or --tensor-model-parallel-size 1, or --nodes 2",
        [
            "--pipeline-model-parallel-size 2 --context-parallel-size 2",
            "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 1",
        ],
    ),
}
"""Words that are wrong, what is said, and for each remedy the words that follow it; of one with a ! the line has none."""


def line(words: str) -> list[str]:
    given = words.split()
    return [*without(LLAMA, *(word[1:] for word in given if word[0] == "!")), *(word for word in given if word[0] != "!")]


@pytest.mark.parametrize("name", ROUNDS)
def test_the_first_remedy_is_enough(name: str, megatron: None, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, says, remedies = ROUNDS[name]
    assert check.main([*NODES, "--without-megatron", "--", *line(wrong)]) == 1
    assert says in (error := capsys.readouterr().err), error
    for words in remedies:
        assert check.main([*NODES, "--without-megatron", "--", *line(words)]) == 0, capsys.readouterr().err
        assert asked_megatron.problems(line(words), 8, MAJOR, {}, False) == []


def test_sizes_say_all_that_is_wrong_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    """What the sizes that are offered settle is not said too, for it offers others; what they leave is."""
    assert check.main([*NODES, "--without-megatron", "--", *LLAMA, "--context-parallel-size", "3"]) == 1
    assert capsys.readouterr().err.count("\n  - ") == 1
    more = ["--context-parallel-size", "3", "--attention-dropout", "0.1"]
    assert check.main([*NODES, "--without-megatron", "--", *LLAMA, *more]) == 1
    assert "--attention-dropout 0.1 would drop whole windows" in capsys.readouterr().err


def test_a_remedy_that_sizes_change_is_said_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    """With what works on the sizes that are offered."""
    more = ["--context-parallel-size", "3", "--lighthouse-budget", "1000"]
    assert check.main([*NODES, "--without-megatron", "--", *LLAMA, *more]) == 1
    error = capsys.readouterr().err
    assert "use --context-parallel-size 2 or 4" in error
    assert "--lighthouse-budget 1000 must be a positive multiple of --lighthouse-tile-budget 128: use" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--attention lighthous --lighthouse-levels 9", ["Did you mean lighthouse?", "use --lighthouse-levels 5"]),
        ("--data-path /no/where", ["--data-path and --mock-data are each", "--data-path /no/where has no"]),
        ("--num-query-groups 6 --tensor-model-parallel-size 4", ["must be a multiple of --num-query-groups 6: use"]),
    ],
)
def test_two_faults_are_said_in_one_round(words: str, says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *words.split()]) == 1
    error = capsys.readouterr().err
    assert [text in error for text in says] == [True] * len(says), error
    assert error.count("\n  - ") == len(says), error


def test_windows_too_wide_for_the_layout_are_fewer_levels(capsys: pytest.CaptureFixture[str]) -> None:
    """One rank would take them, and attend to 66 rows of 131,072."""
    own = [*GPUS, "--without-megatron", "--", *line("!--lighthouse-budget --global-batch-size 32")]
    assert check.main([*own, "--lighthouse-levels", "9"]) == 1
    error = capsys.readouterr().err
    assert "131072 must be a multiple of 524288: use --lighthouse-levels 5 " in error
    use = error.strip().partition(": use ")[2].rstrip(".").split()
    assert "--context-parallel-size" not in use
    assert check.main([*own, *use]) == 0, capsys.readouterr().err


def test_one_machine_is_offered_sizes_and_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """As local.sh asks for it: no more GPUs than given, where fewer do."""
    own = [*NODES, "--runs-here", "now", "--without-megatron", "--", *LLAMA]
    assert check.main([*own, "--context-parallel-size", "3"]) == 1
    assert "= 6 must divide --gpus 8: use --context-parallel-size 2 or 4." in capsys.readouterr().err
    assert check.main(["--nodes", "1", "--gpus-per-node", "12", *own[6:]]) == 1
    assert "= 8 must divide --gpus 12: use " in (error := capsys.readouterr().err)
    assert "--gpus 8." in error
    assert check.main([*own, "--context-parallel-size", "8"]) == 1
    assert "--gpus 16 or 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "right"),
    [
        ("--fp4-format e2m1", "use --fp8-format hybrid"),
        ("--fp8-format e4m3 --fp8-recipe mxfp8", "use --fp8-recipe blockwise, tensorwise or delayed"),
    ],
)
def test_formats_of_other_gpus(more: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([*NODES, "--without-megatron", "--", *LLAMA, *more.split()]) == 0
    capsys.readouterr()
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *more.split()]) == 1
    assert right in capsys.readouterr().err


def test_a_full_validation_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """Of single sequences, which are what --eval-micro-batch-size is where it is not given."""
    more = ["--full-validation", "--multiple-validation-sets", "--split", "99,1,0"]
    assert check.main([*NODES, "--without-megatron", "--", *LLAMA, *more]) == 0, capsys.readouterr().err


def test_modules_that_need_an_engine(capsys: pytest.CaptureFixture[str]) -> None:
    words = line(f"{RECOMPUTE} --recompute-granularity selective --transformer-impl local --no-rope-fusion")
    own = [*NODES, "--runs-here", "--without-megatron", "--", *words, "--recompute-modules"]
    assert check.main([*own, "mlp", "layernorm"]) == 1
    assert "--recompute-modules layernorm needs Transformer Engine" in capsys.readouterr().err
    check.main([*own, "mlp", "core_attn"])
    assert "--recompute-modules" not in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--ffn-hidden-size 127", "--dataloader-type external"])
def test_what_the_check_let_pass_is_refused_by_the_run(words: str, tmp_path: Path) -> None:
    """It ended in the first step, or in Megatron's warm-up of its fusions"""
    run = Processes(tmp_path, 1, [*MODEL, *TEXT, *words.split()])
    assert run.wait() == [2]
    assert re.search(f"{words} (must be a multiple of 2|is for loaders)", run.log.read_text())
